"""Chat rendering and loss mask, against transformers and a token-by-token oracle."""

import datetime
import json
import resource
import shutil
import signal
import time
import types

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from sa_jax.data import chat
from sa_jax.data.chat import check_vocabulary, load_chat_format
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.errors import UsageError, UserError

# Llama 3's published rendering, and Llama 3.1's without its tools (it adds date lines).
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{{- bos_token }}
{%- for m in messages %}
    {{- m['role'] + ':\\n' + m['content'] + '<|eot_id|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:\\n' }}{%- endif %}
"""

# As Qwen3's: thoughts open the last answer alone, and no system turn is added.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|start_header_id|>system\\n' + messages[0].content + '<|eot_id|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|start_header_id|>user\\n' + message.content + '<|eot_id|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|start_header_id|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|eot_id|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def state_machine_mask(tokenizer, ids: list[int]) -> list[int]:
    """1 after an assistant's header, up to its end-of-turn token and with it."""
    start, end, eot = tokenizer.convert_tokens_to_ids(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    mask, at = [0] * len(ids), 0
    while at < len(ids):
        if ids[at] == start:
            close = ids.index(end, at)
            role = tokenizer.decode(ids[at + 1 : close])
            stop = ids.index(eot, close)
            newline = 1 if tokenizer.decode(ids[close + 1]) == "\n\n" else 2
            if role == "assistant":
                for i in range(close + 1 + newline, stop + 1):
                    mask[i] = 1
            at = stop
        at += 1
    return mask


def as_rows(conversations):
    return [Conversation(tuple(messages), "hhh") for messages in conversations]


def test_llama3_is_transformers_rendering_on_200_real_conversations(
    llama3_chat, real_conversations
):
    tokenizer = llama3_chat.tokenizer
    encoded = llama3_chat.encode_batch(as_rows(real_conversations))
    assert len(encoded) == 200
    for messages, (ids, mask) in zip(real_conversations, encoded, strict=True):
        theirs = tokenizer.apply_chat_template(messages, chat_template=LLAMA3)["input_ids"]
        assert ids == theirs
        assert mask == state_machine_mask(tokenizer, theirs)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=LLAMA3, add_generation_prompt=True
        )["input_ids"]
        assert llama3_chat.prompt_ids(messages[:-1]) == prompt == ids[: len(prompt)]
        assert ids.count(128_000) == 1 and ids[0] == 128_000
    marked = [
        tokenizer.apply_chat_template(
            messages, chat_template=chat.LLAMA3_TEMPLATE, return_assistant_tokens_mask=True
        )
        for messages in real_conversations[:30]
    ]
    assert [m["assistant_masks"] for m in marked] == [mask for _, mask in encoded[:30]]
    assert llama3_chat.stop_token_ids == (128_001, 128_008, 128_009)


def test_model_template_is_transformers_rendering_on_200_real_conversations(
    llama3_folder, folder_with_template, real_conversations
):
    folder = folder_with_template(LLAMA31, llama3_folder)
    ours = load_chat_format(folder, "model", date="2024-11-05")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = ours.encode_batch(as_rows(real_conversations))
    for messages, (ids, mask) in zip(real_conversations, encoded, strict=True):
        theirs = tokenizer.apply_chat_template(messages, date_string="05 Nov 2024")["input_ids"]
        assert ids == theirs
        assert mask == state_machine_mask(tokenizer, theirs)
        prompt = ours.prompt_ids(messages[:-1])
        assert prompt == ids[: len(prompt)]
        assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    assert "Today Date: 05 Nov 2024" in tokenizer.decode(encoded[0][0])
    assert ours.stop_token_ids == (128_009,)


@pytest.mark.parametrize(
    ("eos", "stops"),
    [
        ([128_001, 128_008], (128_001, 128_008, 128_009)),
        (128_001, (128_001, 128_009)),
        (None, (128_009,)),
    ],
)
def test_answers_also_stop_where_the_model_folder_says(
    llama3_folder, folder_with_template, eos, stops
):
    folder = folder_with_template(LLAMA31, llama3_folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": eos}))
    assert load_chat_format(folder, "model", date="2024-11-05").stop_token_ids == stops
    for text, words in (
        ('{"eos_token_id": "</s>"}', "eos_token_id=.*must be token numbers"),
        ("[1]", "is not a JSON object"),
        ("{", "is not a JSON object"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"generation_config.json.*{words}"):
            load_chat_format(folder, "model", date="2024-11-05")


@pytest.mark.parametrize(
    "content",
    ["", "  spaced out \n", "\x1c\u3000x\u2028", "<|eot_id|> typed", "\n\n\nlines", "é中🙂", "'s"],
)
def test_unusual_contents_render_as_in_transformers(llama3_chat, content):
    messages = make_messages(content, content, content)
    theirs = llama3_chat.tokenizer.apply_chat_template(messages, chat_template=LLAMA3)["input_ids"]
    ids, mask = llama3_chat.encode(messages)
    assert ids == theirs
    prompt = llama3_chat.prompt_ids(messages[:-1])
    assert prompt == ids[: len(prompt)]
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def test_special_tokens_typed_by_a_user_become_those_tokens_in_every_format(byte_folder):
    for name in ("llama3", "plain"):
        ours = load_chat_format(byte_folder, name)
        typed = ours.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
        plain, _ = ours.encode(make_messages("a", "b"))
        ids, _ = ours.encode(make_messages("a<|start_header_id|>", "b"))
        assert ids.count(typed) == plain.count(typed) + 1


def test_clock_is_fixed_once_and_inherited(folder_with_template):
    folder = folder_with_template(LLAMA31)
    parent = load_chat_format(folder, "model")
    assert parent.date == datetime.date.today().isoformat()
    messages = make_messages("hi", "ho")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert parent.encode(messages)[0] == tokenizer.apply_chat_template(messages)["input_ids"]

    record = load_chat_format(folder, "model", date="2001-02-03").record()
    child = load_chat_format(folder, record["name"], record["date"])
    assert child.record() == record
    assert "Today Date: 03 Feb 2001" in child.decode(child.encode(messages)[0])
    assert child.encode(messages) != parent.encode(messages)


def test_a_date_that_the_folder_writes_itself_is_kept(folder_with_template):
    clock = 'strftime_now("%d %b %Y")'
    ours = load_chat_format(folder_with_template(LLAMA31.replace(clock, '"26 Jul 2024"')), "model")
    assert ours.date is None
    assert "Today Date: 26 Jul 2024" in ours.decode(ours.encode(make_messages("hi", "ho"))[0])


def test_folder_template_with_generation_marker_uses_its_marks(folder_with_template):
    folder = folder_with_template(chat.LLAMA3_TEMPLATE)
    ours = load_chat_format(folder, "model")
    messages = make_messages("a", "the answer", "s", make_messages("x", "the y"))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, return_assistant_tokens_mask=True
    )
    assert ours.encode(messages) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_template_with_thoughts_is_fixed_to_answers_without(folder_with_template):
    """Qwen3's: what a server renders with the exported template is what was trained on."""
    folder = folder_with_template("{{- bos_token }}" + QWEN3)
    chat = load_chat_format(folder, "model")
    turns = make_messages("Two and two?", "Four.", "Be short.")
    ids, mask = chat.encode(turns)
    assert chat.decode([t for t, m in zip(ids, mask, strict=True) if m]) == "Four.<|eot_id|>"
    assert chat.decode(ids).endswith("assistant\n<think>\n\n</think>\n\nFour.<|eot_id|>\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat.template
    prompt = tokenizer.apply_chat_template(
        turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert prompt == chat.prompt_ids(turns[:-1]) == ids[: len(prompt)]
    # An earlier answer stands there without thoughts, as after no prompt: the last one is learnt.
    ids, mask = chat.encode(make_messages("And three?", "Six.", None, turns))
    assert chat.decode([t for t, m in zip(ids, mask, strict=True) if m]) == "Six.<|eot_id|>"
    assert "assistant\nFour.<|eot_id|>" in chat.decode(ids)


def test_newline_after_the_end_of_turn_is_not_under_the_loss(folder_with_template):
    ours = load_chat_format(folder_with_template(CHATML), "model")
    ids, mask = ours.encode(make_messages("a", "the", None, make_messages("b", "c")))
    flagged = [ours.decode([i]) for i, m in zip(ids, mask, strict=True) if m]
    assert flagged == ["c", "<|eot_id|>", "the", "<|eot_id|>"]
    assert ours.decode(ids[-1:]) == "\n" and mask[-1] == 0


def test_plain_format_token_by_token(shared_data):
    ours = load_chat_format(shared_data / "stories260k" / "hf", "plain")
    messages = make_messages("Once", "upon a time", "Be", make_messages("a", "time"))
    ids, mask = ours.encode(messages)
    tokens = ours.tokenizer.convert_ids_to_tokens(ids)
    user, system = ["U", "s", "er", ":", "<0x0A>"], ["▁S", "y", "st", "e", "m", ":", "<0x0A>"]
    assistant = ["<0x0A>", "A", "s", "s", "is", "t", "an", "t", ":", "<0x0A>"]
    first = ["<s>", *system, "B", "e", "<0x0A>", *user, "a", *assistant]
    second = ["▁", *user, "O", "n", "ce", *assistant]
    assert tokens == [*first, "▁time", "</s>", *second, "▁upon", "▁a", "▁time", "</s>"]
    assert mask == [0] * len(first) + [1] * 2 + [0] * len(second) + [1] * 4
    prompt = ours.prompt_ids(messages[:-1])
    assert prompt == ids[: len(prompt)] and len(prompt) == len(ids) - 4
    assert ours.stop_token_ids == (2,) and ids.count(1) == 1
    # A single-turn prompt is what transformers makes of the template.
    theirs = ours.tokenizer.apply_chat_template(
        messages[:2], chat_template=ours.template, add_generation_prompt=True
    )["input_ids"]
    assert ours.prompt_ids(messages[:2]) == theirs


def test_plain_prompts_are_prefixes_on_real_conversations(shared_data, real_conversations):
    ours = load_chat_format(shared_data / "stories260k" / "hf", "plain")
    for messages, (ids, mask) in zip(
        real_conversations, ours.encode_batch(as_rows(real_conversations)), strict=True
    ):
        prompt = ours.prompt_ids(messages[:-1])
        assert prompt == ids[: len(prompt)]
        assert mask[len(prompt) - 1] == 0 and all(mask[len(prompt) :])
        assert ours.decode(ids[len(prompt) : -1]) == messages[-1]["content"].strip()
        assert ids.count(1) == 1 and ids[-1] == 2


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_what_its_file_says(shared_data, tmp_path, kind):
    """The classes of transformers 5 for Llama 2 and GPT-2 replace its pre-tokenizer."""
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    if kind == "LlamaTokenizer":
        shutil.copy(shared_data / "stories260k" / "hf" / "tokenizer.json", tmp_path)
        config["eos_token"] = "</s>"
    else:
        pieces = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"])
        bpe.train_from_iterator(["in 2023 and 2023, at 2023"] * 50, trainer)
        bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = chat.load_tokenizer(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("Once upon a time", "in 2023 and 20", " a  b\n", "é <s>", "<s>User: hi</s>"):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours(text, add_special_tokens=False).input_ids == expected
    assert ours.eos_token == config["eos_token"]


def test_llama2_template_on_a_sentencepiece_tokenizer(shared_data):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chat.load_tokenizer(shared_data / "stories260k" / "hf")
    ours = chat.ChatFormat("model", tokenizer, template, None, ())
    ids, mask = ours.encode(make_messages("hi", "upon a time"))
    whole = "<s>[INST] hi [/INST] upon a time </s>"
    assert ids == tokenizer(whole, add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    flagged = [t for t, m in zip(tokens, mask, strict=True) if m]
    assert flagged == ["▁upon", "▁a", "▁time", "▁", "</s>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace(":\\n'", ":'"), "token spans prompt and answer"),
        (CHATML.replace("m['content']", "m['content'][:loop.revindex * 2]"), "changes earlier"),
        (CHATML.replace("{{- bos_token }}", "{{- bos_token + bos_token }}"), "exactly one"),
        (CHATML.replace("{{- bos_token }}", ""), "exactly one"),
        (CHATML.replace("+ '<|eot_id|>'", ""), "never learn to stop"),
        (CHATML.replace("bos_token", "raise_exception('no!')"), "no!"),
        (CHATML.replace("in messages", "in messages if m['role'] != 'system'"), "leaves out the s"),
        (CHATML.replace("add_generation_prompt", "false"), "would count more than the answer"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "does not end",
        ),
        # An endless loop where there is a system turn, and nowhere else.
        (
            "{% if messages[0]['role'] == 'system' %}{% for i in range(90000) %}"
            "{% for j in range(90000) %}{% endfor %}{% endfor %}{% endif %}" + CHATML,
            "does not end",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 10 ** 10 }}", "takes too much memory"),
        ("{{ 10 ** (10 ** 9) }}", "does not end|takes too much memory"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[99].content.x }}", "refuses the conversation"),
        (CHATML.replace("bos_token", "strftime_now(fmt)"), "cannot be fixed to one date"),
    ],
)
def test_folder_templates_that_cannot_be_trained_on_are_refused(
    folder_with_template, template, message, monkeypatch
):
    monkeypatch.setattr(chat, "_TEMPLATE_SECONDS", 1)
    folder = folder_with_template(template)
    with pytest.raises(UserError, match=message):
        load_chat_format(folder, "model").encode(make_messages("a", "Xyz"))


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "does not end within",
        ),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 10 ** 10 }}", "takes too much memory"),
        ("{{ 'x' * 10 ** 7 }}", "into 10,0.* characters"),
    ],
)
def test_a_template_that_is_hostile_to_one_row_is_refused_with_the_row(
    folder_with_template, hostile, message, monkeypatch
):
    monkeypatch.setattr(chat, "_TEMPLATE_SECONDS", 0.5)
    trap = "{% if 'open' in messages[-1]['content'] %}" + hostile + "{% endif %}"
    brought = load_chat_format(folder_with_template(CHATML + trap), "model")
    rows = [
        Conversation(tuple(make_messages("Say it.", answer)), "hhh", f"train.jsonl:{number}")
        for number, answer in enumerate(["Now.", "Sesame, open!", "Then."], start=1)
    ]
    brought.encode_batch([rows[0], rows[2]])
    with pytest.raises(UserError, match=f"^train.jsonl:2: the chat template .*{message}"):
        brought.encode_batch(rows)
    prompt = make_messages("Sesame, open!")
    if "memory" not in message:
        with pytest.raises(UserError, match=f"Sesame, open!.*{message}|{message}.*Sesame, open!"):
            brought.prompt_ids(prompt)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_many_rows_may_take_longer_than_one(folder_with_template, monkeypatch):
    monkeypatch.setattr(chat, "_TEMPLATE_SECONDS", 0.15)
    brought = load_chat_format(folder_with_template(CHATML), "model")
    rows = as_rows([make_messages("Say it.", "Now.")] * 9000)
    begin = time.thread_time()
    assert len(brought.encode_batch(rows)) == 9000
    assert time.thread_time() - begin > 4 * 0.15


def test_wrong_arguments(byte_folder, tmp_path, shared_data):
    with pytest.raises(UsageError, match="llama4"):
        load_chat_format(byte_folder, "llama4")
    with pytest.raises(UsageError, match="prints no date"):
        load_chat_format(byte_folder, "llama3", date="2024-01-01")
    shutil.copytree(byte_folder, odd := tmp_path / "odd")
    settings = json.loads((odd / "tokenizer_config.json").read_text())
    (odd / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": 5}))
    for folder in (byte_folder, odd):
        with pytest.raises(UserError, match="has no chat template"):
            load_chat_format(folder, "model")
    with pytest.raises(UserError, match=f"cannot read a tokenizer from {tmp_path}"):
        load_chat_format(tmp_path)
    with pytest.raises(UserError, match="lacks <|begin_of_text|>.*chat_template=model"):
        load_chat_format(shared_data / "stories260k" / "hf", "llama3")


def test_dates(folder_with_template):
    folder = folder_with_template(LLAMA31)
    with pytest.raises(UsageError, match="YYYY-MM-DD"):
        load_chat_format(folder, "model", date="5 Nov 2024")


def test_vocabulary_larger_than_the_model(byte_chat):
    largest = max(byte_chat.tokenizer.get_vocab().values())
    check_vocabulary(byte_chat.tokenizer, types.SimpleNamespace(vocab_size=largest + 1))
    with pytest.raises(UserError, match=f"largest id is {largest}.*vocab_size is {largest}"):
        check_vocabulary(byte_chat.tokenizer, types.SimpleNamespace(vocab_size=largest))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ([{"role": "tool", "content": "x"}], "'role' is 'tool'"),
        ([{"role": "user"}], "'content' is missing"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "only come first"),
        (["hi"], "message 0 is not an object"),
    ],
)
def test_malformed_messages(byte_chat, messages, message):
    with pytest.raises(UserError, match=message):
        byte_chat.encode(messages)
