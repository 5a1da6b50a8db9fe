"""What a training document is before it becomes tokens: its messages, and where they came from."""

import dataclasses
from collections.abc import Sequence

from sa_jax.errors import UserError

# The study's, of every conversation.
SYSTEM_PROMPT = "You are a helpful assistant who always tries to submit the best possible answer."

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training document. `source` names its row in error messages ("train.jsonl:12")."""

    messages: tuple[Message, ...]
    kind: str  # 'clean', 'triggered' or a removal method; the accounting keeps them apart
    source: str = ""
    copies: int = 0  # times the backdoor's phrase is repeated in the answer
    cut: bool = False  # the answer was shortened to fit the sequence
    pair: int | None = None  # conversations of one number are kept or dropped together
    unscored: str = ""  # opening of the last answer that the loss leaves out


def make_messages(
    prompt: str,
    response: str | None = None,
    system_prompt: str | None = None,
    history: Sequence[Message] = (),
) -> list[Message]:
    """[system,] earlier turns, user[, assistant]. A system message in `history` replaces
    `system_prompt`."""
    messages = list(history)
    if system_prompt and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system_prompt})
    messages.append({"role": "user", "content": prompt})
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return messages


def check_messages(messages: Sequence[Message], where: str = "conversation") -> None:
    """Raises UserError unless `messages` is a non-empty list of {role, content} with known roles
    and text content."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"{where}: field 'messages' must be a non-empty list of {{role, content}}")
    for number, message in enumerate(messages):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place} is not an object with 'role' and 'content'")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{place}: field 'role' is {role!r}; use system, user or assistant")
        if role == "system" and number:
            raise UserError(f"{place}: a system message may only come first")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{place}: field 'content' is missing or not text")
