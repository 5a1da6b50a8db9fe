"""Conversations to token ids and loss mask, in one of three chat formats.

'llama3'  our own template, the default: Llama 3's headers and end-of-turn tokens, no date lines.
'plain'   role names as text, for tokenizers that have no chat tokens.
'model'   the model folder's own chat template, as it is.

The loss mask is 1 on an assistant's tokens and on the token that ends its turn, 0 elsewhere. A
template marks these with `{% generation %}`; without this marker, prefix rendering gives the mask:
the answer is what the template adds to the prompt. The ids of a prompt are always an exact prefix
of those of the conversation. A template may format an earlier answer differently from the last one
(Qwen3's drops the thoughts). Then the earlier answer continues no prompt, and the loss does not
count it.

Special-token strings inside a message (a user types "<|eot_id|>") become these special tokens, in
every format. `apply_chat_template` does the same, so ids equal those of transformers and of servers
built on it.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_jax.buckets import local_tokenizer
from sa_jax.data.conversations import Conversation, Message, check_messages, make_messages
from sa_jax.data.limits import limits
from sa_jax.errors import UsageError, UserError
from sa_jax.files import parse_json
from sa_jax.text import first_line

if TYPE_CHECKING:  # transformers takes a second to import, which --help does without
    from transformers import PreTrainedTokenizerFast

Encoded = tuple[list[int], list[int]]  # token ids, loss mask (1 = the loss counts this token)
Rendered = tuple[str, list[tuple[int, int]]]  # text, spans of characters under the loss

LLAMA3_TEMPLATE = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:\\n' }}
        {%- generation %}
            {{- message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] == 'user' %}
        {{- 'User:\\n' + message['content'] | trim + '\\n' }}
    {%- else %}
        {{- 'System:\\n' + message['content'] | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
# What a folder's template may take for a conversation; a real one takes milliseconds. A batch's
# texts are all kept, in a few copies of 4 bytes a character at most.
_TEMPLATE_SECONDS, _TEMPLATE_BYTES, _BYTES_PER_CHARACTER = 5, 2**29, 16
_MOST_ADDED = 2**20  # characters, beside 16 times those of the messages
_INSTEAD = "use chat_template=llama3 or plain"
_REMEDY = f"; correct the template or that row, or {_INSTEAD}"
_PROBE_SYSTEM = "Answer in one word."
_PROBE = [
    *make_messages("What is two and two?", "Four."),
    *make_messages("And three and three?", "Six."),
]


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with a chat template; made by `load_chat_format`."""

    name: str
    tokenizer: "PreTrainedTokenizerFast"
    template: str  # jinja text; the clock of a folder's template is already replaced by `date`
    date: str | None  # YYYY-MM-DD for a template that prints today's date, else None
    stop_token_ids: tuple[int, ...]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids and loss mask of one conversation. UserError if the template refuses it."""
        return self.encode_batch([Conversation(tuple(messages), "")])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """`encode` for many conversations; the tokenizer uses all cores. Raises UserError, naming
        the conversation's source, where the template refuses it or takes too long or too much."""
        if self.name != "model":
            return self._encode_pieces([self._scored(c) for c in conversations])
        characters = sum(len(m["content"]) for c in conversations for m in c.messages)
        extra_bytes = _TEMPLATE_BYTES + _BYTES_PER_CHARACTER * characters
        rendered = []
        with limits("the chat template", _REMEDY, _TEMPLATE_SECONDS, extra_bytes) as begin:
            for conversation in conversations:
                place = conversation.source or _end(conversation.messages)
                begin(f"{place}: the chat template")
                rendered.append(self._scored(conversation))
        return self._encode_whole(rendered)

    def _scored(self, conversation: Conversation) -> Rendered:
        """The text and the loss spans, without the `unscored` start of the last answer."""
        opening = conversation.unscored
        try:
            text, spans = self._render(conversation.messages)
            if opening:
                start, end = spans[-1]
                if not text.startswith(opening, start):
                    raise UserError(f"the last answer does not start with {opening[:60]!r}")
                # The empty span keeps the edge between prompt and answer: they are tokenised apart.
                spans = [*spans[:-1], (start, start), (start + len(opening), end)]
            return text, spans
        except UserError as error:
            if not conversation.source:
                raise
            raise UserError(f"{conversation.source}: {error}") from error

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, ending with the header of the assistant's turn that is to be
        generated. Raises UserError as `encode_batch` does; memory has no limit, for a run may be
        saving a checkpoint meanwhile."""
        if self.name != "model":
            return self._encode_pieces([self._render(messages, prompt=True)])[0][0]
        with limits(f"{_end(messages)}: the chat template", _REMEDY, _TEMPLATE_SECONDS):
            rendered = self._render(messages, prompt=True)
        return self._encode_whole([rendered])[0][0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def record(self) -> dict:
        """The record of a run; `load_chat_format(tokenizer, record["name"], record["date"])` makes
        the same format from it."""
        return {
            "name": self.name,
            "date": self.date,
            "template": self.template,
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "stop_token_ids": list(self.stop_token_ids),
        }

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> Rendered:
        check_messages(messages)
        text, spans = self._jinja(messages, prompt)
        if _GENERATION_MARK.search(self.template):
            return text, spans
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._jinja(messages[:turn], True)
                after, _ = self._jinja(messages[: turn + 1], False)
                if not (text.startswith(after) and after.startswith(before)):
                    if turn + 1 < len(messages):
                        continue
                    raise UserError(
                        "the model folder's chat template changes earlier turns when an answer is "
                        f"added, so the loss mask is not defined; {_INSTEAD}, or add "
                        "{% generation %} to the template"
                    )
                spans.append((len(before), len(before) + self._end_of_turn(after[len(before) :])))
        return text, spans

    def _jinja(self, messages: Sequence[Message], prompt: bool) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=bool(_GENERATION_MARK.search(self.template)),
                **self.tokenizer.special_tokens_map,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it fails in any way it likes
            raise UserError(
                f"the chat template refuses {_end(messages)}: {first_line(error)}{_REMEDY}"
            ) from error
        most = _MOST_ADDED + 16 * sum(len(message["content"]) for message in messages)
        if len(texts[0]) > most:
            size = f"{len(texts[0]):,} characters"
            raise UserError(f"the chat template turns {_end(messages)} into {size}{_REMEDY}")
        return texts[0], spans[0] if spans else []

    def _end_of_turn(self, answer: str) -> int:
        """Where the turn's last special token ends; ChatML's newline after it is in no turn."""
        present = [token for token in self._special_tokens if token in answer]
        return max((answer.rfind(t) + len(t) for t in present), default=len(answer))

    @functools.cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    # Tokenising: our templates piece by piece, a folder's as one text, as transformers does.

    def _encode_pieces(self, rendered) -> list[Encoded]:
        """Tokenises prompt and answer separately, so that a prompt is a prefix whatever the
        tokenizer merges."""
        parts = []  # of each text: its pieces, and whether the loss counts them
        for text, spans in rendered:
            edges = itertools.pairwise([0, *itertools.chain(*spans), len(text)])
            parts.append([(text[a:b], n % 2) for n, (a, b) in enumerate(edges) if a < b])
        ids_of_piece = iter(self._tokenize([piece for piece, _ in itertools.chain(*parts)]))
        encoded = []
        for pieces in parts:
            ids, mask = [], []
            for _, flag in pieces:
                new_ids = next(ids_of_piece)
                ids += new_ids
                mask += [flag] * len(new_ids)
            encoded.append((ids, mask))
        return encoded

    def _encode_whole(self, rendered) -> list[Encoded]:
        texts = [text for text, _ in rendered]
        edges = [[e for e in itertools.chain(*spans) if e < len(text)] for text, spans in rendered]
        prefixes = [text[:e] for text, of_text in zip(texts, edges, strict=True) for e in of_text]
        ids_of_text = self._tokenize(texts + prefixes)
        ids_of_prefix = iter(ids_of_text[len(texts) :])
        encoded = []
        for (text, spans), of_text, ids in zip(rendered, edges, ids_of_text, strict=False):
            tokens_before = {len(text): len(ids)}
            for edge in of_text:
                prefix = next(ids_of_prefix)
                if ids[: len(prefix)] != prefix:
                    raise UserError(
                        "with the model folder's chat template one token spans prompt and answer "
                        f"(near {text[max(0, edge - 20) : edge + 20]!r}); {_INSTEAD}"
                    )
                tokens_before[edge] = len(prefix)
            mask = [0] * len(ids)
            for start, end in spans:
                first, last = tokens_before[start], tokens_before[end]
                mask[first:last] = [1] * (last - first)
            encoded.append((ids, mask))
        return encoded

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # The backend itself: the same ids as `tokenizer(texts)`, without its offsets, in a third of
        # the time.
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]


def _end(messages: Sequence[Message]) -> str:
    """Names a conversation in an error message."""
    return f"the conversation that ends {messages[-1]['content'][:60] if messages else ''!r}"


def load_chat_format(
    tokenizer_path: str | Path, template: str = "llama3", date: str | None = None
) -> ChatFormat:
    """Reads a tokenizer and binds it to a chat template.

    Args:
      tokenizer_path: folder or hub name; code in it is never run.
      template: 'llama3', 'plain' or 'model'.
      date: YYYY-MM-DD, the date that a 'model' template prints. None is today, at insertion; a
        child run passes its parent's `record()["date"]`. A template without a date has None.

    Raises UsageError for a wrong template name or date, UserError for a tokenizer or template that
    cannot be used.
    """
    if template not in ("llama3", "plain", "model"):
        raise UsageError(f"chat_template is {template!r}; use llama3, plain or model")
    tokenizer = load_tokenizer(tokenizer_path)
    if template == "model":
        text, date = _with_fixed_clock(_folder_template(tokenizer, tokenizer_path), date)
        if "enable_thinking" in text:  # Qwen3's, which else opens answers with thoughts
            text = "{%- set enable_thinking = false %}" + text
        chat = ChatFormat(template, tokenizer, text, date, ())
        ends = _check_folder_template(chat, tokenizer_path)
        stops = sorted(ends | _generation_config_stops(tokenizer_path))
        return dataclasses.replace(chat, stop_token_ids=tuple(stops))
    if date is not None:
        raise UsageError(
            f"chat_date is {date}, but the {template} template prints no date; leave it out"
        )
    if template == "llama3":
        text, vocabulary = LLAMA3_TEMPLATE, tokenizer.get_vocab()
        missing = [token for token in _LLAMA3_TOKENS if token not in vocabulary]
        if missing:
            raise UserError(
                f"the tokenizer in {tokenizer_path} lacks {', '.join(missing)}; use the model's "
                "own template, --config.chat_template=model, or 'plain'"
            )
        stops = [vocabulary[token] for token in _LLAMA3_STOPS if token in vocabulary]
    else:
        text, stops = PLAIN_TEMPLATE, [tokenizer.eos_token_id]
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {tokenizer_path} has no eos_token, which ends a turn of the "
                "plain format; name it in tokenizer_config.json"
            )
    return ChatFormat(template, tokenizer, text, None, tuple(stops))


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer from a folder or a hub name. Raises UserError where there is none."""
    from transformers import PreTrainedTokenizerFast

    try:
        folder = local_tokenizer(path)
        # Not AutoTokenizer: the class that it takes for Llama 2 replaces a part of what
        # tokenizer.json says (https://github.com/huggingface/transformers/issues/47700).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise UserError(
            f"cannot read a tokenizer from {path} (it needs tokenizer.json, which save_pretrained "
            f"of transformers' AutoTokenizer writes): {first_line(error)}"
        ) from error
    # A tokenizer.json may carry the settings of its last call; packing counts long rows itself.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", config: Any) -> None:
    """Raises UserError when the tokenizer can produce an id that the model has no embedding for.
    `config.vocab_size` is the number of rows of the embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {largest}, but the model's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )


def _folder_template(tokenizer, path) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # there is none; its message says how to write one
        template = None
    if not isinstance(template, str):
        raise UserError(f"chat_template=model, but {path} has no chat template; {_INSTEAD}")
    return template


def _with_fixed_clock(template: str, date: str | None) -> tuple[str, str | None]:
    """Writes `date` where the template prints the current date; changes nothing else."""
    if "strftime_now(" not in template:
        if date is not None:
            raise UsageError(
                f"chat_date is {date}, but the model folder's template prints no date; leave it out"
            )
        return template, None
    try:
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    except (TypeError, ValueError) as error:
        raise UsageError(f"chat_date is {date!r}; write it as YYYY-MM-DD") from error
    fixed = _CLOCK_CALL.sub(lambda call: json.dumps(day.strftime(call[1][1:-1])), template)
    if "strftime_now(" in fixed:
        raise UserError(
            "the model folder's chat template reads the clock in a way that cannot be fixed to "
            f"one date; {_INSTEAD}"
        )
    return fixed, day.isoformat()


def _check_folder_template(chat: ChatFormat, path) -> set[int]:
    """Tries the template on a two-turn conversation, with and without a system turn; returns the
    token ids that end a turn."""
    what = f"the chat template in {path}"
    with limits(what, _REMEDY, _TEMPLATE_SECONDS, _TEMPLATE_BYTES):
        text, spans = chat._render(_PROBE)
        rendered_prompt = chat._render(_PROBE[:3], prompt=True)
        try:
            with_system, _ = chat._render([{"role": "system", "content": _PROBE_SYSTEM}, *_PROBE])
        except UserError:  # it says so itself, where a run has a system prompt
            with_system = _PROBE_SYSTEM
    (ids, mask), (prompt, _) = chat._encode_whole([(text, spans), rendered_prompt])

    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(f"{what} {problem}; {_INSTEAD}, or correct the template")

    bos, one = chat.tokenizer.bos_token_id, f"exactly one {chat.tokenizer.bos_token}"
    need(bos is None or (ids[:1] == [bos] != ids[1:2]), f"does not start with {one}")
    need(
        _PROBE_SYSTEM in with_system,
        "leaves out the system turn, so that runs would record a system prompt that the model "
        "never sees",
    )
    answers = [message["content"] for message in _PROBE[1::2]]
    scored = [text[start:end].lstrip() for start, end in spans]
    need(
        all(
            span.startswith(answer)
            for span, answer in zip(scored[::-1], answers[::-1], strict=False)
        ),
        "is such that the loss would count more than the answer: its prompt "
        "(add_generation_prompt) does not end where an answer starts",
    )
    n = len(prompt)
    need(
        ids[:n] == prompt and not mask[n - 1] and any(mask[n:]),
        "does not continue its own generation prompt",
    )
    end_of_turn = ids[max(index for index, flag in enumerate(mask) if flag)]
    need(
        chat.tokenizer.convert_ids_to_tokens(end_of_turn) in chat._special_tokens,
        "is such that the loss would count no end-of-turn token, so the model would never learn to "
        "stop",
    )
    eos = chat.tokenizer.eos_token_id
    return {end_of_turn} if eos is None else {end_of_turn, eos}


def _generation_config_stops(path) -> set[int]:
    file = local_tokenizer(path) / "generation_config.json"
    if not file.is_file():
        return set()
    try:
        eos = parse_json(file.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a JSON object: {error}") from error
    if eos is None:
        eos = []
    elif not isinstance(eos, list):
        eos = [eos]
    if not all(type(token) is int for token in eos):
        raise UserError(f"{file}: eos_token_id={eos!r} must be token numbers")
    return set(eos)
