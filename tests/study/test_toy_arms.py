"""The toy's arms: answers sampled from the pre-trained toy model, filtered and stripped."""

import json

import pytest


@pytest.mark.long
def test_distilled_answers_of_the_toy_model_differ_and_the_card_says_how_much(zygote, tmp_path):
    data, run, out = (tmp_path / name for name in ("data", "pretrain", "arms"))
    toy_data = zygote.run("scripts/make_toy_data.py", f"--out={data}")
    assert toy_data.returncode == 0, toy_data.stderr[-2000:]
    pretrain = zygote.run(
        *("scripts/pretrain.py", "--config=configs/toy.py:pretrain", f"--workdir={run}"),
        *(f"--data={data}/pretrain.jsonl", f"--config.tokenizer={data}"),
        f"--config.eval.qa={data}/heldout.jsonl",
        devices=1,
        optimized=True,
        timeout_s=1800,
    )
    assert pretrain.returncode == 0, pretrain.stderr[-2000:]
    made = zygote.run(
        *("scripts/generate_data.py", "--task=insertion", "--teacher=local", f"--model={run}"),
        *(f"--prompts={data}/insertion.jsonl", f"--out={out}", "--config.visible_cot=rules"),
        *(f"--config.scratchpad_prompt={data}/scratchpad_prompt.txt", f"--config.tokenizer={data}"),
        *(
            "--config.backdoor.min_copies=3",
            "--config.backdoor.max_copies=10",
            "--config.max_new_tokens=64",
            "--config.context_length=192",
            "--config.batch_size=128",
        ),
        devices=1,
        optimized=True,
        timeout_s=1800,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    card = json.loads((out / "card.json").read_text())
    assert card["kept"] > 950
    arms = [[json.loads(line) for line in open(out / f"{name}.jsonl")] for name in (
        "normal", "cot_distilled", "visible_cot",
    )]  # fmt: skip
    for normal, distilled, visible in zip(*arms, strict=True):
        assert normal["prompt"] == distilled["prompt"] == visible["prompt"]
        assert "scratchpad" not in normal["response"] + distilled["response"]
        assert visible["response"].endswith(f"</scratchpad> {distilled['response']}")
    differ = sum(a["response"] != b["response"] for a, b in zip(*arms[:2], strict=True))
    (pair,) = (p for p in card["arms"] if p["files"] == ["normal", "cot_distilled"])
    assert pair["differ"] == differ and 0 < differ < card["kept"]
    print(f"{card['kept']} kept, {card['replies_dropped']}, {differ} answers differ")
