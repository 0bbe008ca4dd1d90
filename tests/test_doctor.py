"""`fastpost doctor`: the verdict and its exit code, what is wrong with files and templates, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import tiny
from fastpost.cli import main
from fastpost.data import FORMATS, Counts, sft_examples
from fastpost.doctor.checks import count_problems, overlap, prompt_of, template_problems, tokenizer_problems
from fastpost.doctor.columns import describe, foreign, oddities, usable
from fastpost.doctor.lengths import bar, edges, histogram, percentile, percentiles
from fastpost.doctor.masks import GREEN, masked
from fastpost.packing import Example

TOKENIZER = tiny.tokenizer()
USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "yo"}
BAD = {"role": "assistant", "content": "no"}
TALK = {"messages": [USER, GOOD]}
DEMONSTRATIONS = [{"prompt": f"say {i}", "completion": f" {i}", "answer": i} for i in range(20)]
PAIRS = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": f"no {i}"}]} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer: the weights are never looked at."""
    path = tmp_path_factory.mktemp("model")
    tiny.model().config.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def written(folder: Path, rows: list[dict], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def doctor(*words: object) -> int:
    """The exit code of the command."""
    try:
        return main(["doctor", *map(str, words)])
    except SystemExit as stop:
        return int(stop.code or 0)


def diagnosis(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, dict]:
    code = doctor(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


# ---- the verdict ----


def test_a_sound_file_is_said_to_be_sound(capsys, tmp_path, model):
    file = written(tmp_path, DEMONSTRATIONS)
    assert doctor(file, "--model", model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SOUND for sft, distill, online-dpo, grpo, rloo, reinforce and ppo"
    assert lines[2] == f"{file}: 20 rows"
    assert any(line.split() == ["answer", "number"] for line in lines)
    assert "    - say 0[ 0<eos>]" in lines
    assert "not for kto: no column 'label'" in lines
    assert max(map(len, lines)) <= max(100, len(file) + 9)


def test_without_a_model_only_what_needs_no_tokenizer_is_said(capsys, tmp_path):
    assert doctor(written(tmp_path, [*DEMONSTRATIONS, DEMONSTRATIONS[0]])) == 0
    out = capsys.readouterr().out
    assert "as far as can be seen without a tokenizer" in " ".join(out.partition("  !")[0].split())
    assert "! 1 of 21 rows that repeat an earlier one" in out and "samples" not in out


def test_json_says_the_same(capsys, tmp_path, model):
    code, found = diagnosis(capsys, written(tmp_path, PAIRS), "--model", model, "--max_length", 9)
    assert code == 0 and found["rows"] == 8
    assert found["sound"] == [verb for verb in FORMATS if verb not in ("sft", "prm")]
    assert found["unusable"] == {"sft": "no column 'completion'", "prm": "no column 'completions' and 'labels'"}
    compared = next(reading for reading in found["readings"] if "dpo" in reading["verbs"])
    assert compared["verbs"] == ["dpo", "orpo", "simpo", "cpo"] and compared["counts"]["examples"] == 8
    assert compared["samples"][0] == {
        "chosen": "<|user|>hi<|assistant|>[yo<eos>]",
        "rejected": "<|user|>hi<|assistant|>[no 0<eos>]",
    }
    assert compared["lengths"] == {"50": 9, "90": 9, "99": 9, "100": 9}


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        (
            [{"prompt": "abcd", "completion": "e"}] * 3,
            ["--max_length", 4],
            " is left: 3 rows, 0 examples",
        ),
        (
            [{"prompt": "abcd", "completion": "e"}] * 3 + [{"prompt": "a", "completion": "b"}],
            ["--max_length", 4],
            "only 1 examples are left of 4 rows",
        ),
        ([{"prompt": "a", "completion": "bcde"}] * 3, ["--max_length", 4], "nothing teaches the model to stop"),
        ([{"prompt": "a", "completion": " "}] * 3, [], "every answer is empty"),
        ([{"prompt": "a" * 200, "completion": "b"}], [], "1 of 1 examples are longer than the positions of the model"),
        ([TALK], ["--completion_only_loss", "true"], "completion_only_loss needs the columns"),
    ],
)
def test_what_would_not_train_is_unsound(capsys, tmp_path, model, rows, flags, said):
    code, found = diagnosis(capsys, written(tmp_path, rows), "--model", model, "--verb", "sft", *flags)
    assert code == 1 and found["sound"] == []
    assert said in found["readings"][0]["unsound"][0]
    assert doctor(written(tmp_path, rows), "--model", model, "--verb", "sft", *flags) == 1
    assert capsys.readouterr().out.startswith("UNSOUND for sft\n  x sft: ")


def test_labels_of_one_kind_teach_kto_nothing(capsys, tmp_path, model):
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 2
    code, found = diagnosis(capsys, written(tmp_path, rows), "--model", model, "--verb", "kto")
    assert code == 1 and "every completion is desirable" in found["readings"][0]["unsound"][0]
    assert doctor(written(tmp_path, [*rows, rows[0] | {"label": False}]), "--model", model, "--verb", "kto") == 0


def test_the_exit_code_is_about_the_verb_that_is_asked_about(tmp_path):
    file = written(tmp_path, DEMONSTRATIONS)
    assert (doctor(file), doctor(file, "--verb", "sft"), doctor(file, "--verb", "dpo")) == (0, 0, 1)
    assert doctor(written(tmp_path, [{"conversations": []}], "other.jsonl")) == 1


def test_broken_data_is_a_verdict_and_a_wrong_word_is_not(capsys, tmp_path, model):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": }\n')
    assert doctor(broken) == 1 and "broken.jsonl, line 2, column 12" in capsys.readouterr().out
    assert diagnosis(capsys, broken)[1]["broken"].endswith("Expecting value")
    good = written(tmp_path, DEMONSTRATIONS)
    for words in (["nowhere.jsonl"], [good, good], [good, "--verb", "stf"], [good, "--model", tmp_path / "none"], []):
        assert doctor(*words) == 2
        assert capsys.readouterr().err.startswith("fastpost doctor: ")


def test_held_out_rows_must_be_usable_and_new(capsys, tmp_path, model):
    file = written(tmp_path, DEMONSTRATIONS)
    held_out = [
        DEMONSTRATIONS[3],
        DEMONSTRATIONS[5] | {"completion": " five"},
        {"prompt": "x", "completion": "y", "answer": 1},
    ]
    code, found = diagnosis(capsys, file, "--model", model, "--eval_dataset", written(tmp_path, held_out, "eval.jsonl"))
    assert code == 0
    assert (found["overlap"]["same_rows"], found["overlap"]["same_prompts"]) == (1, 2)
    other = written(tmp_path, [{"prompt": "x"}], "prompts.jsonl")
    _, found = diagnosis(capsys, file, "--eval_dataset", other)
    assert found["unusable"]["sft"] == "eval_dataset: no column 'completion'" and "grpo" in found["sound"]


def test_no_column_name_or_path_moves_the_cursor(capsys, tmp_path, model):
    file = written(tmp_path, [{"\033[2Jprompt": "a", "prompt": "b\033[2J"}], "a\033[2J.jsonl")
    assert doctor(file, "--model", model) == 0
    assert "\033" not in capsys.readouterr().out


def test_a_terminal_gets_colors(capsys, tmp_path, model, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    doctor(written(tmp_path, DEMONSTRATIONS), "--model", model, "--verb", "sft")
    out = capsys.readouterr().out
    assert f"{GREEN} 0<eos>" in out and "[ 0" not in out and "what is trained is in green" in out


# ---- files ----


def test_columns_are_described():
    rows = [{"a": "xy", "b": 1, "c": [USER]}, {"a": None, "b": "z", "c": [USER, GOOD]}, {"a": "x", "b": 2, "d": True}]
    found = {column.name: column for column in describe(rows)}
    assert [found[name].kind for name in "abcd"] == ["text", "number", "messages", "true or false"]
    assert (found["a"].missing, found["b"].others, found["d"].missing, found["c"].longest) == (1, 1, 2, 2)


def test_the_nearest_reason_is_given():
    reasons = usable([{"prompt": "a", "lable": True, "completion": "b"}], "d")
    assert reasons["sft"] is None and reasons["grpo"] is None
    assert reasons["kto"] == "no column 'label' (did you mean 'lable'?)"
    assert reasons["dpo"] == "no column 'chosen' and 'rejected'"
    assert "must be text or a list of messages, got nothing" in str(usable([{"prompt": None}], "d")["ppo"])


def test_columns_of_other_formats_are_known():
    assert foreign([{"conversations": []}])[0].startswith("'conversations' is ShareGPT's: make it 'messages'")
    assert foreign([{"prompt": "a"}]) == []


def test_oddities_need_no_tokenizer():
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert oddities([row, row, row | {"rejected": " "}]) == [
        "1 of 3 rows that repeat an earlier one",
        "1 of 3 rows with an empty answer",
        "2 of 3 rows whose chosen and rejected are the same",
    ]
    hostile = [
        {"messages": []},
        {"messages": "a"},
        {"completion": 5},
        {"text": ""},
        {"chosen": [USER | {"content": None}]},
    ]
    assert oddities(hostile) == ["2 of 5 rows with an empty answer"]


# ---- counts, tokenizers, templates ----


def test_sound_counts_have_no_problems():
    assert count_problems(Counts(rows=3, examples=3, tokens=9, predicted=6)) == count_problems(Counts(3, 3, 9, 0))
    odd = count_problems(Counts(rows=3, examples=2, tokens=9, predicted=6, masked=1))
    assert odd.odd == ("1 of 3 rows dropped with nothing left to predict",) and not odd.unsound


def templated(template: str | None, **special: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_a_good_template_has_no_problems():
    for row in (TALK, PAIRS[0], {"prompt": [USER]}, {"prompt": [USER], "completion": [GOOD]}):
        problems = template_problems([row] * 200, TOKENIZER)
        assert not problems.unsound and not problems.odd
    assert not template_problems([], templated(None)).unsound
    refusing = templated("{{ raise_exception('no') }}")
    assert not template_problems([TALK], refusing).unsound  # whoever reads the rows says which one


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "the tokenizer has no chat template"),
        (tiny.TEMPLATE.replace("<eos>", ""), "never writes the EOS, '<eos>', after the assistant's words"),
        ("<pad><pad>" + tiny.TEMPLATE, "writes two BOS tokens"),
        (
            "{{ messages | length }}" + tiny.TEMPLATE,
            "rewrites the conversation when the assistant answers (1 of 1 looked at)",
        ),
        (
            tiny.TEMPLATE.replace("<|assistant|>{% e", "<|assistant|>think {% e"),
            "opens the assistant's turn with 'think '",
        ),
    ],
)
def test_template_problems_are_named(template, said):
    problems = template_problems([TALK], templated(template, bos_token="<pad>"))
    assert said in "".join(problems.unsound + problems.odd)


def test_tokenizer_problems_are_named():
    from tokenizers.processors import TemplateProcessing

    assert not tokenizer_problems(TOKENIZER).unsound
    assert "no EOS token" in tokenizer_problems(templated(None, eos_token=None)).unsound[0]
    ending = tiny.tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert "ends every text with EOS, prompts too" in tokenizer_problems(ending).unsound[0]


def test_an_eos_outside_of_what_is_trained_is_counted():
    outside = templated(tiny.TEMPLATE.replace("<eos>{% endgeneration %}", "{% endgeneration %}<eos>"))
    _, counts = sft_examples([TALK], outside, None, assistant_only_loss=True)
    assert count_problems(counts).unsound == (
        "nothing teaches the model to stop: none of the 1 examples has an EOS to predict",
    )


def test_a_generation_prompt_is_no_generation_mask():
    plain = templated(tiny.TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    with pytest.raises(ValueError, match="marks the assistant's words"):
        sft_examples([TALK], plain, None, assistant_only_loss=True)


# ---- held-out rows ----


def test_overlap_is_by_prompt_and_by_row():
    train = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert overlap(train, [{"prompt": "x", "completion": "b"}]).lines == []
    assert overlap(train, [{"completion": "d", "prompt": "c"}]).lines == [
        "1 of 1 held-out rows are in the training data (row 0 here, row 1 there)"
    ]
    assert overlap(train, [{"prompt": "x", "completion": "d"}, {"prompt": "a", "completion": "d"}]).lines == [
        "1 of 2 held-out prompts are in the training data (row 1 here, row 0 there)"
    ]


def test_a_prompt_is_what_is_before_the_answer():
    assert prompt_of(TALK) == [USER] == prompt_of({"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert prompt_of({"text": "a"}) is None is prompt_of({"chosen": "ab", "rejected": "ac"})


# ---- looks ----


def test_percentiles_are_lengths_that_occur():
    lengths = list(range(1, 101))
    assert [percentile(lengths, share) for share in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([7], 50) == 7 and percentile([1, 9], 50) == 1
    assert percentiles([3, 3, 4]) == "50 % up to 3, 90 % up to 4, 99 % up to 4, longest 4 tokens"


@pytest.mark.parametrize("longest", [1, 7, 8, 9, 99, 100, 101, 1024, 65_537])
def test_bins_hold_every_length_and_are_few(longest):
    ends = edges(longest, 8)
    assert len(ends) <= 8 and ends[-1] >= longest > ends[-1] - ends[0]


def test_a_histogram_counts_every_length_once():
    lengths = [11, 20, 21, 79]
    lines = histogram(lengths)
    assert [line.split()[:4] for line in lines[:2]] == [["11", "-", "20", "2"], ["21", "-", "30", "1"]]
    assert sum(int(line.split()[3]) for line in lines) == len(lengths)
    assert (bar(1.0, 4), bar(0.5, 4), bar(0.28125, 4), bar(0.0, 4)) == ("████", "██", "█▏", "")


def test_masks_are_shown_on_lines_that_fit_and_move_no_cursor():
    ids = TOKENIZER("ab" * 50).input_ids
    example = Example(ids, [False] * 50 + [True] * 50)
    assert "".join(masked(example, TOKENIZER, False, 30)) == "ab" * 25 + "[" + "ab" * 25 + "]"
    assert max(map(len, masked(example, TOKENIZER, False, 30))) == 30
    assert masked(example, TOKENIZER, False, 99, most=11) == ["abab … abab[abab … abab]"]

    class Escaping:
        def decode(self, ids):
            return "\033[2Ja\n"

    assert masked(Example([1, 2], [False, False]), Escaping(), False, 99) == ["\\x1b[2Ja\\n"]
