"""Reading prompts: every source, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import codecs
import json
import sys
import types

import pytest

from alignpro.config import DataConfig, InstructionsConfig, PairsConfig
from alignpro.data import (
    DataError,
    PairRow,
    PromptRow,
    load_instructions,
    load_pairs,
    load_prompts,
    stack_columns,
)
from alignpro.types import Conversation

ROWS = [
    {"prompt": "Bake bread", "answer": "flour", "split": "train"},
    {"prompt": "Plant a tree\u2028now", "answer": "soil", "split": "heldout"},
    {"prompt": "Caf\u00e9?", "answer": "beans", "split": "train"},
]
EXPECTED = [PromptRow(r["prompt"], {"answer": r["answer"], "split": r["split"]}) for r in ROWS]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return name

    return write


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path, rows) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)


def test_jsonl_json_and_csv_read_the_same(write):
    table = "prompt,answer,split\n" + "".join(
        f'"{r["prompt"]}",{r["answer"]},{r["split"]}\n' for r in ROWS
    )
    for name, content in {
        "a.jsonl": jsonl(ROWS),
        "b.json": json.dumps(ROWS),
        "c.csv": table,
        "D.JSONL": codecs.BOM_UTF8 + jsonl(ROWS).replace("\n", "\r\n").encode(),
        "e.jsonl": "\n" + jsonl(ROWS).replace("\n", "\n\n"),
        "f.csv": codecs.BOM_UTF8 + table.encode(),
    }.items():
        assert load_prompts(write(name, content)) == EXPECTED, name


def test_parquet_reads_the_same(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS)
    assert load_prompts(path) == EXPECTED


def test_csv_fields_with_line_breaks_and_quotes(write):
    name = write("a.csv", 'prompt\nseparated\u2028plain\n"two\nlines, ""quoted"""\nplain\n')
    assert [r.prompt for r in load_prompts(name)] == [
        "separated\u2028plain",
        'two\nlines, "quoted"',
        "plain",
    ]


def test_another_column_and_the_split(write):
    rows = [{"question": r["prompt"], "split": r["split"]} for r in ROWS]
    name = write("a.jsonl", jsonl(rows))
    kept = load_prompts(name, column="question", split="train")
    assert [r.prompt for r in kept] == ["Bake bread", "Caf\u00e9?"]


SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello"}
LAST = {"role": "user", "content": "Bake bread"}


def test_chats_are_conversations_and_a_lone_user_turn_is_text(write):
    chats = [[LAST], [SYSTEM, LAST], [ASKED, ANSWERED, LAST], [ANSWERED, ASKED, LAST]]
    for column in ("prompt", "messages"):
        name = write("a.jsonl", jsonl({column: chat, "x": 1} for chat in chats))
        rows = load_prompts(name)
        assert rows[0] == PromptRow("Bake bread", {"x": 1})
        assert [Conversation.of(row.prompt).messages for row in rows] == chats
        assert load_prompts(name, column) == rows


def test_an_answer_after_the_last_user_turn_is_a_reference(write):
    rows = [
        {"messages": [ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED, LAST, {"role": "assistant", "content": "Knead."}]},
        {"messages": [ASKED, ANSWERED], "reference": "mine"},
        {"messages": [ASKED, ANSWERED, ANSWERED]},
        {"messages": [LAST]},
    ]
    read = load_prompts(write("a.jsonl", jsonl(rows)))
    whole = Conversation((("user", "Hi"), ("assistant", "Hello")), "Bake bread")
    assert [row.prompt for row in read] == ["Hi", whole, "Hi", "Hi", "Bake bread"]
    columns = stack_columns(read)
    assert columns.pop("conversations")[1] == whole.messages  # for rewards that read messages
    assert columns == {"reference": ["Hello", "Knead.", "mine", None, None]}


def test_sharegpt_and_parts_of_text(write):
    turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bake bread")]
    rows = [
        {"conversations": [{"from": who, "value": text} for who, text in turns]},
        {
            "messages": [
                SYSTEM,
                ASKED,
                ANSWERED,
                {"role": "user", "content": parts("Bake", "bread")},
            ]
        },
        {"prompt": [{"role": "user", "content": parts("Bake bread")}]},
    ]
    first, second, third = (row.prompt for row in load_prompts(write("a.jsonl", jsonl(rows))))
    assert first.messages == [SYSTEM, ASKED, ANSWERED, LAST]
    assert second == Conversation(first.history, "Bake\nbread")
    assert third == "Bake bread"


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_of_turns_without_answers_the_first_is_the_prompt(write):
    rows = [{"question_id": 81, "turns": ["Bake bread", "Now shorter."]}]
    (row,) = load_prompts(write("a.jsonl", jsonl(rows)))
    assert row == PromptRow("Bake bread", rows[0])


def test_pairs_whose_prompt_is_a_conversation(write):
    rows = [{"messages": [SYSTEM, LAST], "instruction": "Be brief."}]
    (pair,) = load_pairs(write("a.jsonl", jsonl(rows)))
    assert (pair.prompt.messages, pair.instruction) == ([SYSTEM, LAST], "Be brief.")


def test_chats_from_parquet(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Bake bread"}]}]
    write_parquet(tmp_path / "a.parquet", rows)
    assert load_prompts(tmp_path / "a.parquet") == [PromptRow("Bake bread")]


def test_pairs(write):
    rows = [{"prompt": "Bake bread", "instruction": "Be brief.", "tone": "dry"}]
    assert load_pairs(write("a.jsonl", jsonl(rows))) == [PairRow("Bake bread", "Be brief.")]
    rows[0]["instruction"] = ""  # leaves the prompt as it is
    assert load_pairs(write("c.jsonl", jsonl(rows))) == [PairRow("Bake bread", "")]
    renamed = write("b.csv", "x,y\nBake bread,Be brief.\n")
    assert load_pairs(renamed, "x", "y") == [PairRow("Bake bread", "Be brief.")]


def test_the_columns_of_pairs_are_named(write):
    """BPO: the user's prompt is under "instruction", what is to be written beside it."""
    bpo = {"instruction": "Why is it?", "context": "", "optimized_prompt": "Say why in one line."}
    name = write("bpo.json", json.dumps([bpo]))
    columns = PairsConfig(name, prompt="instruction", instruction="optimized_prompt")
    assert load_pairs(columns) == [PairRow("Why is it?", "Say why in one line.")]
    with pytest.raises(DataError, match=r"row 0: no column 'prompt'.*name the one .* data\.prompt"):
        load_pairs(name)


def test_what_users_asked_is_no_candidate_instruction(write):
    bpo = {"instruction": "Why is it?", "context": "", "optimized_prompt": "Say why in one line."}
    alpaca = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    for row in (bpo, alpaca):
        with pytest.raises(DataError, match=r"a\.json, row 0: column 'instruction'.*users asked"):
            load_instructions(write("a.json", json.dumps([row])))
    name = write("b.json", json.dumps([bpo, bpo | {"optimized_prompt": " "[:0]}]))
    named = InstructionsConfig(name, instruction="optimized_prompt")
    assert load_instructions(named) == ["Say why in one line."]
    for clear in ({"instruction": "Be brief."}, {"prompt": "Hi", "instruction": "Be brief."}):
        assert load_instructions(write("c.jsonl", jsonl([clear]))) == ["Be brief."]


def test_what_belongs_to_an_instruction_is_not_lost(write):
    """Alpaca's and Dolly's second column is a part of what the user asked."""
    rows = [
        {"instruction": "Sum it up.", "input": "A long text.", "output": "Short."},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
    ]
    name = write("a.json", json.dumps(rows))
    with pytest.raises(DataError, match=r"row 0.*'input' beside it.*data.prompt=\[instruction, in"):
        load_prompts(name, "instruction")
    assert load_prompts(name, ["instruction", "input"]) == [
        PromptRow("Sum it up.\n\nA long text.", {"output": "Short."}),
        PromptRow("Say hi.", {"output": "Hi."}),
    ]
    alone = write("b.json", json.dumps(rows[1:]))
    assert load_prompts(alone, "instruction") == [
        PromptRow("Say hi.", {"input": "", "output": "Hi."})
    ]
    with pytest.raises(DataError, match="row 0: no column 'question'"):
        load_prompts(name, ["instruction", "question"])


def test_data_of_a_stage_or_its_own():
    own = DataConfig("who/set", subset="main", prompt="question")
    held_out = DataConfig(split="validation")
    assert held_out.of(own) == DataConfig(
        "who/set", subset="main", prompt="question", split="validation"
    )
    assert DataConfig("b.csv").of(own) == DataConfig("b.csv")
    with pytest.raises(ValueError, match=r"subset: expected its default None \(it goes with path"):
        DataConfig(subset="main")


def test_rows_know_their_place(write):
    name = write("a.csv", 'prompt\n\n"two\nlines"\nlast\n')
    assert [row.place for row in load_prompts(name)] == ["a.csv, line 3", "a.csv, line 5"]


def test_columns_are_stacked_beside_the_rows():
    rows = [PromptRow("a", {"x": 1}), PromptRow("b", {"x": 2, "y": 3})]
    assert stack_columns(rows) == {"x": [1, 2], "y": [None, 3]}
    assert stack_columns([]) == {}


def test_data_of_messages_give_rewards_the_messages(write):
    rows = load_prompts(write("a.jsonl", jsonl([{"prompt": [LAST]}, {"prompt": "Hi"}])))
    assert stack_columns(rows) == {"conversations": [[LAST], [ASKED]]}
    assert stack_columns(rows[1:]) == {}
    clash = load_prompts(write("b.jsonl", jsonl([{"prompt": [LAST], "conversations": 1}])))
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: column 'conversations' collides"):
        stack_columns(clash)


def test_the_packaged_prompts_are_there_and_split():
    train, heldout = (load_prompts("everyday", split=s) for s in ("train", "heldout"))
    assert len(heldout) == 64
    assert len(train) + len(heldout) == len(load_prompts("everyday")) >= 150
    assert not {r.prompt for r in train} & {r.prompt for r in heldout}


def test_the_packaged_pairs_are_there():
    pairs = load_pairs("instructions")
    assert len(pairs) >= 90
    assert len({pair.instruction for pair in pairs}) > 40


def chat(*roles):
    return {"prompt": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": }\n',
            "a.jsonl, line 2: malformed JSON: .*column 12",
        ),
        ("a.jsonl", '{"prompt": "x"}\n\n["x"]\n', "line 3: expected an object.*got list"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "x"}\n', r"line 2: no column 'prompt'.*\['text'\]"),
        ("a.jsonl", '{"prompt": 3}', "line 1, column 'prompt': expected text or a chat, got int"),
        ("a.jsonl", '{"prompt": null}', r"got nothing \(null\)"),
        ("a.jsonl", '{"prompt": " \\n"}', "line 1, column 'prompt': .*got an empty string"),
        ("a.jsonl", '{"prompt": "ab\\ud800c"}', r"lone surrogate U\+D800 at character 2"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}', "line 2: byte 0xff is no valid UTF-8"),
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.jsonl", "[" * 100_000, "line 1: malformed JSON: nested too deeply"),
        ("a.json", '[{"prompt": "x"},\n{"prompt"}]', "a.json, line 2: malformed JSON"),
        ("a.json", '[{"prompt": "x"}, {"prompt": ""}]', "a.json, row 1, column 'prompt'"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", "<html></html>", "a.json, line 1: malformed JSON"),
        ("a.csv", "prompt,b\nx,1\ny\n", "a.csv, line 3: expected 2 columns, got 1"),
        ("a.csv", "prompt,b\nx,1,2\n", "a.csv, line 2: expected 2 columns, got 3"),
        ("a.csv", "prompt,prompt\nx,y\n", "column 'prompt' appears twice"),
        ("a.csv", "text\nx\n", r"a.csv, line 2: no column 'prompt'.*\['text'\]"),
        ("a.csv", "prompt,b\n,1\n", "line 2, column 'prompt': .*empty"),
        ("a.csv", 'prompt\n"never closed\n', "a.csv, line 2: malformed CSV"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "line 1: malformed JSON: key 'prompt' appears",
        ),
        ("a.csv", "prompt\n", "a.csv: no rows"),
        ("a.csv", "", "a.csv: no rows"),
        ("a.parquet", b"PAR1 no", "a.parquet: no readable Parquet file"),
        ("a.txt", "x", r"a.txt: expected a file ending in \.jsonl.*got '.txt'"),
        (
            "a.jsonl",
            jsonl([chat("user"), chat("user", "tool", "user")]),
            "line 2.*message 1: .*'tool'",
        ),
        ("a.jsonl", jsonl([chat("system", "assistant")]), "expected a chat with a user turn, got"),
        ("a.jsonl", jsonl([chat("user", "assistant", "system")]), "or in the answer to it, got"),
        ("a.jsonl", jsonl([chat()]), r"user turn, got the roles \[\]"),
        ("a.jsonl", jsonl([{"messages": "hi"}]), "column 'messages': expected a list, got text"),
        ("a.csv", "turns\nhi\n", "line 2, column 'turns': expected a list, got text"),
        ("a.jsonl", jsonl([{"turns": ["hi", 3]}]), "expected a list of the user's turns as text"),
        ("a.jsonl", jsonl([{"turns": []}]), "expected a list of the user's turns as text"),
        ("a.jsonl", jsonl([{"turns": [" "]}]), "got an empty string"),
        (
            "a.jsonl",
            jsonl([{"conversations": [{"from": ["observation"], "value": "x"}]}]),
            "message 0: expected 'from' to be one of human, .*got .*observation",
        ),
        (
            "a.jsonl",
            jsonl([{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}]),
            "message 0: expected text or parts of type 'text', got a part of type 'image_url'",
        ),
        (
            "a.jsonl",
            jsonl([{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}]),
            r"message 0: expected text in a part, got nothing \(null\)",
        ),
        (
            "a.jsonl",
            jsonl([{"prompt": [{"role": "user", "content": "x", "tool_calls": [{}]}]}]),
            "message 0: expected text alone, got 'tool_calls' beside it",
        ),
        (
            "a.jsonl",
            jsonl([{"prompt": [{"role": "user", "content": None}]}]),
            r"got nothing \(null",
        ),
        (
            "a.jsonl",
            '{"prompt": [{"role": "system", "content": "\\ud800"},'
            ' {"role": "user", "content": "x"}]}',
            r"lone surrogate U\+D800 at character 0",
        ),
        (
            "a.jsonl",
            jsonl([{"prompt": ["x"]}]),
            "message 0: expected 'role' and 'content', got str",
        ),
        ("a.jsonl", jsonl([{"prompt": [{"role": "user"}]}]), "'role' and 'content'"),
        (
            "a.jsonl",
            jsonl([{"prompt": [{"role": "user", "content": ["x"]}]}]),
            "a part of type 'str'",
        ),
        ("a.jsonl", jsonl([{"prompt": [{"role": "user", "content": ""}]}]), "an empty string"),
    ],
)
def test_one_clear_line_for_bad_files(write, name, content, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=says) as caught:
        load_prompts(write(name, content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(name)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        load_prompts("missing.jsonl")
    with pytest.raises(DataError, match="folder: is a folder"):
        load_prompts("folder")
    with pytest.raises(DataError, match=r"evryday: expected a file .*everyday, instructions"):
        load_prompts("evryday")
    with pytest.raises(DataError, match=r"\./somewhere: there is no such file"):
        load_prompts("./somewhere")
    for absent in ("folder/prompts.tsv", "folder/prompts"):  # no data set on the hub
        with pytest.raises(DataError, match=f"{absent}: there is no such file"):
            load_prompts(absent)
    with pytest.raises(DataError, match="everyday: subset and revision are of a hub data set"):
        load_prompts(DataConfig("everyday", subset="main"))


def test_splits_that_are_not_there(write):
    name = write("a.jsonl", jsonl(ROWS))
    with pytest.raises(
        DataError, match=r"no rows in split 'test'; there are \['heldout', 'train'\]"
    ):
        load_prompts(name, split="test")
    mixed = write("b.jsonl", jsonl([*ROWS, {"prompt": "x"}]))
    with pytest.raises(DataError, match=r"b\.jsonl, line 4: no column 'split', which other rows"):
        load_prompts(mixed, split="train")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("", "line 3: nothing in column 'split', which says what a row is for"),
        (" ", "line 3: nothing in column 'split'"),
        ("Train", "line 3: split 'Train' beside 'train'; write them alike"),
        ("train ", "line 3: split 'train ' beside 'train'"),
    ],
)
def test_no_row_is_lost_by_what_its_split_is_called(write, cell, says):
    name = write("a.csv", f"prompt,split\nBake bread,train\nPlant a tree,{cell}\n")
    with pytest.raises(DataError, match=says):
        load_prompts(name, split="train")
    assert len(load_prompts(name, split=None)) == 2


def test_without_a_split_column_all_is_training_data(write):
    name = write("a.csv", "prompt\nBake bread\n")
    for split in ("train", None):
        assert load_prompts(name, split=split) == [PromptRow("Bake bread")]
    with pytest.raises(DataError, match=r"a\.csv: no column 'split', so all .*; add .* null"):
        load_prompts(name, split="heldout")


def test_pairs_name_the_column_that_is_wrong(write):
    name = write(
        "a.jsonl", '{"prompt": "x", "instruction": "y"}\n{"prompt": "x", "instruction": 1}'
    )
    with pytest.raises(DataError, match="line 2, column 'instruction': expected text, got int"):
        load_pairs(name)
    with pytest.raises(DataError, match="line 1: no column 'rewrite'"):
        load_pairs(name, instruction_column="rewrite")


def test_a_hub_data_set_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, *subset, split, **options):
        asked.append((name, *subset, split, *options.items()))
        if name == "who/missing":
            raise FileNotFoundError("not on the hub\nmore lines")
        if name == "who/several" and not subset:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', "
                "'other']\nExample of usage:\n\t`load_dataset('who/several', 'main')`"
            )
        return ROWS

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_prompts("who/prompts") == EXPECTED
    assert load_prompts("who/prompts", split="test") == EXPECTED
    assert asked == [("who/prompts", "train"), ("who/prompts", "test")]
    with pytest.raises(
        DataError, match=r"'who/missing', split 'train': not on the hub more lines$"
    ):
        load_prompts("who/missing")
    with pytest.raises(DataError, match=r"configs: \['main', 'other'\]; name one as who/several:"):
        load_prompts("who/several")
    asked.clear()
    for source in (
        DataConfig("who/several:main"),
        DataConfig("who/several", subset="main"),
        DataConfig("who/several:main", split="test", revision="v1"),
    ):
        assert load_prompts(source) == EXPECTED
    assert asked == [
        ("who/several", "main", "train"),
        ("who/several", "main", "train"),
        ("who/several", "main", "test", ("revision", "v1")),
    ]
    with pytest.raises(DataError, match="the subset is named twice"):
        load_prompts(DataConfig("who/several:main", subset="main"))


@pytest.mark.parametrize(
    ("module", "source", "remedy"),
    [
        ("datasets", "who/prompts", "pip install 'datasets'"),
        ("pyarrow.parquet", "a.parquet", r"pip install 'alignpro\[parquet\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(write, monkeypatch, module, source, remedy):
    if source.endswith("parquet"):
        write(source, b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=remedy):
        load_prompts(source)


@pytest.mark.parametrize("column", ["nope", ("prompt", "nope")])
def test_a_prompts_column_that_is_not_there_is_named_by_its_key(tmp_path, column):
    (tmp_path / "p.csv").write_text("prompt,answer\nhi,yo\n")
    with pytest.raises(DataError, match=r"line 2: no column 'nope'.*is meant as data\.prompt$"):
        load_prompts(tmp_path / "p.csv", column)
    with pytest.raises(DataError, match=r"no column 'instruction'.*as data\.instruction$"):
        load_pairs(tmp_path / "p.csv")
