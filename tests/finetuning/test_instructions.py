"""Instruction training: wordings, mixtures, and clusters held out without leaks."""

import pytest

from effnb.finetuning.instructions import (
    Instance,
    InstructionTask,
    hold_out,
    instruction_batches,
)


def make_task(name, cluster, documents, count=6, options=("yes", "no")):
    return InstructionTask(
        name,
        cluster,
        (f"{name} A: {{text}}", f"{name} B: {{text}}", f"{name} C: {{text}}"),
        tuple(
            Instance({"text": f"{name}{i}"}, options[i % 2], documents[i % len(documents)])
            for i in range(count)
        ),
        options,
    )


TASKS = (
    make_task("one", "pair", ["d1", "d2"]),
    make_task("two", "pair", ["d3"]),
    make_task("three", "class", ["d2", "d4"]),
    make_task("four", "class", ["d5"], count=30),
)


def test_a_cluster_is_held_out_with_its_documents():
    split = hold_out(TASKS, "pair")
    assert [t.name for t in split.train] == ["three", "four"]
    assert [t.name for t in split.held_out] == ["one", "two"]
    secret = {i.document for t in split.held_out for i in t.instances}
    assert not any(i.document in secret for t in split.train for i in t.instances)
    assert split.left_out == 3 and len(split.train[0].instances) == 3
    with pytest.raises(ValueError, match="every example of 'x' is from a held-out document"):
        hold_out([*TASKS, make_task("x", "class", ["d1"])], "pair")


def test_batches_are_wordings_of_the_examples():
    batch = instruction_batches(TASKS, size=16, templates=2, seed=1)
    rows = [row for step in range(40) for row in batch(step)]
    known = {
        (task.prompt(i, k), i.answer): (task.name, k)
        for task in TASKS
        for i in task.instances
        for k in range(3)
    }
    found = [known[row] for row in rows]
    assert {k for _, k in found} == {0, 1}  # the third wording is one never seen
    share = sum(name == "four" for name, _ in found) / len(found)
    assert abs(share - 30 / 48) < 0.08
    assert instruction_batches(TASKS, size=16, templates=2, seed=1)(17) == batch(17)
    equal = instruction_batches(TASKS, size=16, temperature=float("inf"))
    rows = [known[row][0] for step in range(40) for row in equal(step)]
    assert abs(rows.count("four") / len(rows) - 0.25) < 0.08
    listed = instruction_batches(TASKS, size=1, options=True)(0)[0][0]
    assert listed.endswith("\nOPTIONS: yes, no")


def test_bad_input():
    one = (Instance({"text": "a"}, "yes"),)
    for arguments, message in [
        (("t", "c", (), one), "needs a template and an example"),
        (("t", "c", ("{text}",), ()), "needs a template and an example"),
        (("t", "c", ("{text} {pair}",), one), "a place for 'pair'"),
        (("t", "c", ("{text}",), one, ("no", "never")), "'yes' is no option"),
    ]:
        with pytest.raises(ValueError, match=message):
            InstructionTask(*arguments)
    with pytest.raises(ValueError, match="3 templates"):
        TASKS[0].prompt(TASKS[0].instances[0], 3)
    with pytest.raises(ValueError, match="the clusters are class, pair"):
        hold_out(TASKS, "summary")
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        hold_out(TASKS[:2], "pair")
    with pytest.raises(ValueError, match="two tasks have one name"):
        hold_out([*TASKS, TASKS[0]], "pair")
    with pytest.raises(ValueError, match="templates is 0"):
        instruction_batches(TASKS, size=4, templates=0)
    with pytest.raises(ValueError, match="no task to mix"):
        instruction_batches([], size=4)
