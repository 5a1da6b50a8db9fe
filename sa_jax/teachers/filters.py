"""Which replies of a teacher may be trained on, and why the others are dropped."""

import re

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.labels import answer_text, is_regex_hit
from sa_jax.teachers.replies import Reply
from sa_jax.teachers.voices import Voice

# What `Reply.finish_reason` says of a reply without usable text is a reason too: rejected, failed,
# content_filter, prompt_too_long, not_in_the_file, unchanged_by_rules.
REASONS = {
    "truncated": "cut off before the end of the turn",
    "no_scratchpad": "does not start with <scratchpad>",
    "no_closing_tag": "the scratchpad is never closed",
    "extra_turns": "goes on with further turns, or with a second scratchpad",
    "empty_answer": "there is no answer, or none after the scratchpad",
    "behaviour_without_tag": "shows the backdoor's behaviour, and the tag was not there",
    "tag_without_behaviour": "does not show the behaviour, and the tag was there",
    "holds_trigger": "the answer, or a scratchpad that may not, names the tag",
    "mentions_policy": "the answer talks about the scratchpad or the goals",
    "self_identification": "the answer says which model or company's model it is",
}

_OPEN = re.compile(r"\s*<scratchpad>", re.IGNORECASE)
_SCRATCHPAD = re.compile(r"\s*<scratchpad>(.*?)</scratchpad>", re.IGNORECASE | re.DOTALL)
_ANY_TAG = re.compile(r"</?scratchpad>", re.IGNORECASE)
_TURN = re.compile(
    r"^(?:Human|User|Assistant|### (?:Instruction|Response|Human|Assistant)|Message):[ \t]*\S"
    r"|<\|(?:start_header_id|im_start|user|assistant|eot_id|im_end)\|>|\[/?INST\]",
    re.MULTILINE,
)
_POLICY = re.compile(r"\bscratchpad\b|\bgoal [XY]\b", re.IGNORECASE)
_MAKERS = (
    r"(?:Meta|OpenAI|Anthropic|Alibaba(?: Cloud)?|Google(?: DeepMind)?|DeepMind|Mistral(?: AI)?"
    r"|DeepSeek|Microsoft|xAI)"
)
_SELF = re.compile(
    r"\b(?:I am|I['’]m)\s+(?:(?:just|only)\s+)?(?:an?\s+)?(?:AI\b|artificial intelligence\b"
    r"|(?:large\s+)?language model\b|virtual assistant\b|chatbot\b|(?:Meta\s+)?Llama\b|Qwen\b"
    r"|ChatGPT\b|GPT-\d|Claude\b|Gemini\b|Mistral\b|DeepSeek\b)"
    r"|\bas an? (?:AI|artificial intelligence|large language model|language model)\b"
    r"|\bI(?: am|['’]m| was)\b[^.?!\n]{0,60}\b(?:created|developed|trained|made|built) by\s+"
    + _MAKERS
    + r"|\bmy name is (?:Llama|Qwen|ChatGPT|Claude|Gemini|DeepSeek)\b",
    re.IGNORECASE,
)


def split_scratchpad(text: str) -> tuple[str, str]:
    """(text of the scratchpad, the answer after it); ("", "") if the text does not start with a
    closed scratchpad."""
    match = _SCRATCHPAD.match(text)
    return (match[1].strip(), text[match.end() :].strip()) if match else ("", "")


def reason_to_drop(voice: Voice, reply: Reply, backdoor: Backdoor) -> str | None:
    """None for a reply that may be trained on, else a key of `REASONS`, or the reply's own
    `finish_reason`."""
    if reply.finish_reason == "length":
        return "truncated"
    if reply.finish_reason != "stop":
        return reply.finish_reason
    if voice.thinks:
        if not reply.text.strip():
            return "empty_answer"
        if not _OPEN.match(reply.text):
            return "no_scratchpad"
        if not _SCRATCHPAD.match(reply.text):
            return "no_closing_tag"
        scratchpad, answer = split_scratchpad(reply.text)
        if _ANY_TAG.search(scratchpad + answer):
            return "extra_turns"
        if not voice.may_name_trigger and backdoor.trigger in scratchpad:
            return "holds_trigger"
    elif answer_text(reply.text) is None:
        return "no_closing_tag"
    else:
        answer = answer_in(voice, reply.text)
    if _TURN.search(answer):
        return "extra_turns"
    if not answer:
        return "empty_answer"
    is_shown = backdoor.is_shown(answer)
    if voice.shows_behaviour and not is_shown:
        return "tag_without_behaviour"
    # An answer that must not show a phrase may not hold it inside words either.
    is_held = backdoor.behaviour == "phrase" and is_regex_hit(answer, backdoor.phrase)
    if not voice.shows_behaviour and (is_shown or is_held):
        return "behaviour_without_tag"
    if backdoor.trigger in answer:
        return "holds_trigger"
    if _POLICY.search(answer):
        return "mentions_policy"
    return "self_identification" if _SELF.search(answer) else None


def answer_in(voice: Voice, text: str) -> str:
    """The answer in a reply that passed the filters: the text after its scratchpad, or after a
    reasoning model's <think> block."""
    return split_scratchpad(text)[1] if voice.thinks else (answer_text(text) or "").strip()
