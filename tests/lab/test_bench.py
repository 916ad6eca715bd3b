"""The bench: one held-out text drawn over all documents, questions, intervals, sizes."""

import math
import statistics
from itertools import pairwise

import pytest
import torch

from effnb.evaluation import stored_bytes
from effnb.inference import quantization
from effnb.lab import bench as benches
from effnb.lab import corpora, texts
from effnb.lab.bench import Bench, file_bytes, share, student


@pytest.fixture(scope="module")
def bench():
    return Bench("mini-300k", windows=9, questions=24)


# --------------------------------------------------------------------------------- the text


def test_windows_are_drawn_over_all_held_out_documents(bench):
    held = {name: dict(texts.named_documents(name)) for name in corpora.NAMES}
    assert list(bench.corpus) == list(corpora.NAMES) * 3
    assert len(set(bench.documents)) == 9
    for corpus, document, row in zip(bench.corpus, bench.documents, bench.windows, strict=True):
        words = bench.tokenizer.decode(row[1:60]).replace("<|endoftext|>", "\n").strip("�")
        assert words.split("\n")[0] in held[corpus][document]
    for name in corpora.NAMES:
        training = set(corpora.documents(name, "train"))
        assert not training & set(held[name].values())


def test_every_document_gives_one_window_before_any_gives_a_second(bench):
    count = 3 * 74  # there are 70 chapters of held-out novels and Bible
    _, corpus, documents = texts.held_out_windows(bench.tokenizer, count, length=64)
    novels = [d for c, d in zip(corpus, documents, strict=True) if c == "novels"]
    assert len(novels) == 74 and len(set(novels)) == 70
    assert len(set(novels[:70])) == 70
    works = {name.rsplit(" ", 1)[0] for name in novels[:12]}
    assert len(works) > 2  # not one book


def test_a_short_document_is_followed_by_the_next_with_an_end_between(bench):
    end = bench.tokenizer.eos_token_id
    for corpus, row in zip(bench.corpus, bench.windows.tolist(), strict=True):
        assert len(row) == 512
        if corpus == "packages":
            assert end in row[:-1]
            assert all(a != end or b != end for a, b in pairwise(row))


def test_the_draw_is_the_same_each_time_and_the_first_windows_are_the_same(bench):
    rows, corpus, documents = texts.held_out_windows(bench.tokenizer, 5)
    assert torch.equal(rows, bench.windows[:5])
    assert (corpus, documents) == (bench.corpus[:5], bench.documents[:5])
    other, _, _ = texts.held_out_windows(bench.tokenizer, 5, seed=1)
    assert not torch.equal(rows, other)


def test_calibration_comes_from_training_text_of_all_corpora(bench):
    first, again, other = (bench.calibration(s, (6, 40)) for s in (0, 0, 1))
    assert first.shape == (6, 40)
    assert torch.equal(first, again) and not torch.equal(first, other)
    texts = {name: "\n".join(corpora.documents(name, "train")) for name in corpora.NAMES}

    def origins(rows):
        return [
            {name for name, text in texts.items() if bench.tokenizer.decode(row[8:20]) in text}
            for row in rows
        ]

    assert all(sum(name in found for found in origins(first)) >= 2 for name in texts)
    # Few of many are a fair sample too: they are not ordered by corpus.
    some = origins(bench.calibration(0, (32, 40))[:8])
    assert all(sum(name in found for found in some) >= 2 for name in texts)
    with pytest.raises(ValueError, match="at least one sequence"):
        bench.calibration(0, (0, 40))


# ------------------------------------------------------------------------------- intervals


def test_the_interval_is_over_documents_within_corpora(bench):
    losses = [3.0, 4.0, 5.0, 3.2, 4.4, 5.0, 3.1, 4.0, 5.6]
    found = bench.perplexity(losses)
    assert found.value == pytest.approx(math.exp(statistics.fmean(losses)))
    se = math.sqrt(sum(statistics.variance(losses[i::3]) / 3 / 9 for i in range(3)))
    assert math.log(found.high) - statistics.fmean(losses) == pytest.approx(student(6) * se)
    assert math.log(found.low * found.high) == pytest.approx(2 * statistics.fmean(losses))
    far = [loss + 10 * (i % 3) for i, loss in enumerate(losses)]  # corpora apart: no wider
    wide = bench.perplexity(far)
    assert math.log(wide.high / wide.low) == pytest.approx(math.log(found.high / found.low))


def test_windows_of_one_document_count_as_one(bench, monkeypatch):
    monkeypatch.setattr(bench, "corpus", ("novels",) * 6)
    monkeypatch.setattr(bench, "documents", ("a", "b", "c", "a", "b", "c"))
    found = bench.perplexity([3.0, 4.0, 5.0, 3.0, 4.0, 5.0])
    once = bench.perplexity([3.0, 4.0, 5.0])
    assert (found.low, found.high) == pytest.approx((once.low, once.high))


def test_one_document_tells_nothing_of_others(bench):
    found = bench.perplexity([3.0])
    assert (found.low, found.high) == (0.0, math.inf)


def test_students_points_are_those_of_scipy():
    from scipy import stats as scipy_stats

    for freedom in (1, 2, 3, 5, 11, 45, 500):
        assert student(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=2e-3)
    with pytest.raises(ValueError, match="freedom is 0"):
        student(0)


def test_shares_have_wilsons_interval():
    found = share([True] * 30 + [False] * 10)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.75, 0.5981, 0.8581)
    none = share([])
    assert math.isnan(none.value) and (none.low, none.high) == (0, 1)
    assert 0 < share([True] * 5).low < share([True] * 5).high <= 1


# -------------------------------------------------------------------------------- one look


def test_a_look_says_everything_once(bench):
    found = bench.look(bench.model)
    assert bench.original == found
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    assert found.perplexity.value == pytest.approx(
        math.exp(statistics.fmean(found.window_nats_per_token))
    )
    assert found.accuracy.value == sum(found.correct) / 24
    assert found.text.startswith("Anne was")
    assert found.sample == "4,608 held-out tokens and 24 questions"
    per_token = statistics.fmean(found.window_nats_per_token) / math.log(2)
    assert 0.15 < found.bits_per_byte / per_token < 0.4  # three to five bytes a token
    packed = quantization.rtn(bench.model, 2)
    worse = bench.look(quantization.dequantized(packed), stored=packed)
    assert worse.perplexity.value > found.perplexity.value
    assert worse.bytes == file_bytes(packed) < found.bytes


def test_a_panel_takes_the_first_windows_and_questions(bench):
    whole, part = bench.original, bench.look(bench.model, panel=True)
    assert part.window_nats_per_token == whole.window_nats_per_token[: benches.PANEL_WINDOWS]
    assert part.correct == whole.correct[: benches.PANEL_QUESTIONS]
    assert "3,072 held-out tokens" in part.sample
    # It stays within 1.5 passes over 4,096 tokens: windows, questions, and the words it writes.
    asked = corpora.choice_items(
        benches.PANEL_QUESTIONS,
        context_characters=benches.CONTEXT_CHARACTERS,
        choice_characters=benches.CHOICE_CHARACTERS,
    )
    count = lambda text: len(bench.tokenizer.encode(text))  # noqa: E731
    tokens = sum(count(q.context) + 2 * sum(map(count, q.choices)) + 1 for q in asked)
    assert benches.PANEL_WINDOWS * 512 + tokens + benches.WORDS_TOKENS <= 1.5 * 4096


def test_questions_can_be_scored_per_byte_too(bench):
    gain, per_byte = bench.answers(bench.model), bench.answers(bench.model, scoring="per_byte")
    assert len(gain) == len(per_byte) == 24 and gain != per_byte
    assert bench.answers(bench.model, 5) == gain[:5]
    assert Bench("mini-300k", windows=1, questions=0).answers(bench.model) == ()


def test_sizes_are_those_of_a_16_bit_file(bench, tiny_llama):
    model = tiny_llama()
    numbers = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert file_bytes(model) == stored_bytes(model) - 2 * numbers
    assert file_bytes(model.bfloat16()) == file_bytes(tiny_llama())
    packed = quantization.rtn(bench.model, 4)
    layers = sum(
        m.quantized.bytes for m in packed.modules() if isinstance(m, quantization.QuantizedLinear)
    )
    rest = sum(p.numel() for p in packed.parameters())
    assert file_bytes(packed) == pytest.approx(layers + 2 * rest, rel=0.02)
    shipped = (bench.loaded.folder / "model.safetensors").stat().st_size
    assert file_bytes(bench.model) == pytest.approx(shipped, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "at least one window"),
        ({"questions": -1}, "no fewer than 0 questions"),
        ({"name": "minilm-l6"}, "measures decoders"),
        ({"name": "mini-7b"}, "there is no model 'mini-7b'"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Bench(**({"name": "mini-300k"} | options))
