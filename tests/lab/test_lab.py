import pytest

import effnb.lab


def test_every_name_is_found_where_the_lab_says():
    for name in effnb.lab.__all__:
        assert getattr(effnb.lab, name) is not None
    assert effnb.lab.panel is effnb.lab.panels.panel
    assert set(effnb.lab.__all__) == set(dir(effnb.lab))


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'slider'"):
        effnb.lab.slider  # noqa: B018
