"""Which characters of a conversation's page the assistant says: exactly, or the conversation is refused with the reason.

A template that marks them with {% generation %} is believed. Any other is asked for the same conversation up to each turn: as the model
meets it (the prompt), and after the answer. Where both begin the whole page, the turn is what lies between: what the model reads and says
in use is then what it is trained on. Templates that write earlier turns anew, without their reasoning, fail this, and the row is named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.tasks.chats.template import NO_EXTRAS, Extras, Message, marked_page, marks_answers, page, template_of
from atoll.tasks.rows import RowProblem
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what the assistant thought; transformers hands all of them to templates."""
_THINK = re.compile(r"</?think>")
_WAYS = (
    'set train_on = "last" in [data]; or give the reasoning, or chat_template_kwargs such as {"enable_thinking": false}; or put a template '
    "with {% generation %} into the base's folder as chat_template.jinja"
)
_PROBES = ("\ue000", "\ue001")


def said(message: Message) -> str:
    """A message's text, whole or in parts."""
    content = message.get("content")
    return "".join(str(part["text"]) for part in content) if isinstance(content, list) else str(content or "")


@dataclass(frozen=True, slots=True)
class Page:
    """A conversation's text, and where the assistant speaks in it: places in characters, in order, apart from each other."""

    text: str
    places: tuple[tuple[int, int], ...]


def spoken_page(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras, learned: Sequence[bool] | None = None
) -> Page:  # fmt: skip
    """The page with the places of the assistant's turns, each up to and including what ends it; with `learned`, of those messages alone.

    Raises: RowProblem where they cannot be told exactly, or where the template leaves out something of the row; as page.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [i for i in answers if learned is None or learned[i]]
    if not turns:
        raise RowProblem("no answer of the assistant that is to be learned", "at least one", "")
    if marks_answers(template_of(tokenizer, extras)):
        text, marked = marked_page(messages, tokenizer, extras)
        places = list(_merged(marked))
        if not places or len(places) != len(answers) != len(turns):
            got = f"{counted(len(places), 'part')} that the template marks as said by the assistant, and {counted(len(answers), 'answer')}"
            raise RowProblem(got, "a {% generation %} part for every answer", "")
        found = Page(text, tuple(places if turns == answers else [places[answers.index(i)] for i in turns]))
        if len(places) == len(answers) and (number := _unclosed(found, messages, turns)):
            raise RowProblem(
                f"message {number}, of which the template marks as said by the assistant all but what ends the turn", 
                "what ends a turn within {% generation %}: else nothing would end an answer", "",
            )  # fmt: skip
    else:
        text = page(messages, tokenizer, extras)
        places = [(_start(messages, i, text, tokenizer, extras), _end(messages, i, text, tokenizer, extras)) for i in turns]
        found = _closed(Page(text, tuple(places)), messages, turns, tokenizer, extras)
    _check_whole(messages, found, turns, extras, tokenizer)
    return found


def opening(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras) -> str:
    """What the model reads before it answers `messages`.

    Raises: as page.
    """
    prompt = page(messages, tokenizer, extras, open_turn=True) if messages else ""
    if messages and prompt != page(messages, tokenizer, extras):
        return prompt
    # Nothing opens the turn, so that it begins where pages with different answers part, less a mere space.
    lead = _shared(*(_answered(messages, probe, tokenizer, extras) for probe in _PROBES))
    return lead if lead.startswith(prompt) and lead[len(prompt) :].strip() else prompt


def _answered(messages: Sequence[Message], answer: str, tokenizer: PreTrainedTokenizerBase, extras: Extras) -> str:
    """The page with an answer that the template shows, as a text or in parts."""
    for content in (answer, [{"type": "text", "text": answer}]):
        text = page([*messages, {"role": "assistant", "content": content}], tokenizer, extras)
        if answer in text:
            break
    return text


def _start(messages: Sequence[Message], i: int, whole: str, tokenizer: PreTrainedTokenizerBase, extras: Extras) -> int:
    """Where the turn of message `i` begins in the page."""
    prompt = opening(messages[:i], tokenizer, extras)
    if whole.startswith(prompt):
        return len(prompt)
    shared = len(_shared(whole, prompt))
    written, read = (text[max(shared - 20, 0) : shared + 20] for text in (whole, prompt))
    raise RowProblem(
        f"message {i + 1}, before which the chat template writes ...{written!r}, and for a model that is to answer ...{read!r}",
        f"a conversation that the model meets as it is trained on: {_WAYS}", "",
    )  # fmt: skip


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))]


def _end(messages: Sequence[Message], i: int, whole: str, tokenizer: PreTrainedTokenizerBase, extras: Extras) -> int:
    """Where the turn of message `i` ends in the page."""
    if i == len(messages) - 1:
        return len(whole)
    alone = page(messages[: i + 1], tokenizer, extras)
    if whole.startswith(alone):
        return len(alone)
    # gpt-oss ends its last turn with another token than those before it, Phi-3 the whole page with one more.
    opened = opening(messages[:i], tokenizer, extras).removeprefix(page(messages[:i], tokenizer, extras) if i else "")
    goes_on = page(messages[: i + 1], tokenizer, extras, open_turn=True)
    candidates = [goes_on.removesuffix(opened)] if opened and goes_on.endswith(opened) else []
    candidates += [alone.removesuffix(str(tokenizer.eos_token or ""))]
    for text in candidates:
        if whole.startswith(text):
            return len(text)
    raise RowProblem(
        f"message {i + 1}, which the chat template writes otherwise once others follow (as without its reasoning)",
        f"turns that are written as they were said: {_WAYS}", "",
    )  # fmt: skip


def _closed(
    found: Page, messages: Sequence[Message], turns: Sequence[int], tokenizer: PreTrainedTokenizerBase, extras: Extras
) -> Page:  # fmt: skip
    """The page as it is where the template ends the assistant's turns itself.

    Where it does not (GLM-4), what ends a turn is the token that begins the next one; the last turn gets that of a user.
    """
    if not _unclosed(found, messages, turns):
        return found
    text, places = found.text, list[tuple[int, int]]()
    if turns[-1] == len(messages) - 1:
        probe = page([{"role": role, "content": _PROBES[0]} for role in ("user", "assistant", "user")], tokenizer, NO_EXTRAS)
        text += _first_special([*probe.split(_PROBES[0]), "", ""][2], tokenizer)
    for (start, stop), number in zip(found.places, turns, strict=True):
        token = _first_special(text[stop:], tokenizer)
        if not token:
            raise RowProblem(
                f"message {number + 1}, after which the chat template writes nothing that ends the turn", 
                "a template that does, as with {{ eos_token }}: else nothing would end an answer", "",
            )  # fmt: skip
        places.append((start, stop + len(token)))
    return Page(text, tuple(places))


def _unclosed(found: Page, messages: Sequence[Message], turns: Sequence[int]) -> int:
    """The first of the turns, counted from 1, that ends with what is said; 0 where something follows that in all of them."""
    for i, (start, stop) in zip(turns, found.places, strict=True):
        content = _THINK.split(said(messages[i]))[-1].strip()
        if content and found.text[start:stop].rstrip().endswith(content):
            return i + 1
    return 0


def _first_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return max((str(token) for token in known if token and text.startswith(str(token))), key=len, default="")


def _merged(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Places that touch as one, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in places:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        elif stop > start:
            joined.append((start, stop))
    return iter(joined)


def _check_whole(
    messages: Sequence[Message], found: Page, turns: Sequence[int], extras: Extras, tokenizer: PreTrainedTokenizerBase
) -> None:  # fmt: skip
    """Whether all that the row says stands on the page, and what the assistant says among what it is trained to say."""
    text, places = found.text, dict(zip(turns, found.places, strict=True)) if len(turns) == len(found.places) else {}
    ends = [0, *(at for place in found.places for at in place), len(text)]
    read = "".join(text[start:stop] for start, stop in list(itertools.pairwise(ends))[::2])
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i not in turns:
            continue  # Read before the answer in the form that the model meets, which may leave out what it thought.
        start, stop = places.get(i, (ends[1], ends[-2]))
        for key, piece in _pieces(message):
            if message["role"] == "assistant":
                # The prompt may begin what the assistant says, as "<think>".
                is_there = text.find(piece, max(start - len(piece) + 1, 0), stop) >= 0
            else:
                is_there = piece in read or _matters(messages, i, key, text, tokenizer, extras)
            if not is_there:
                raise RowProblem(
                    f"message {i + 1}, of whose {key} the chat template leaves something out: {piece[:60]!r}",
                    "a template that writes all that the row says, or a row without it", "",
                )  # fmt: skip
    for name, given in (("tools", extras.tools), ("documents", extras.documents)):
        if given and not re.search(rf"\b{name}\b", template_of(tokenizer, extras)):
            raise RowProblem(f"{name}, which the chat template does not write", f"a template that takes {name}, or a row without", name)


def _pieces(message: Message) -> Iterator[tuple[str, str]]:
    """What must be read on the page, by key."""
    for key in ("content", *REASONING):
        value = said(message) if key == "content" else str(message.get(key) or "")
        yield from ((key, piece.strip()) for piece in _THINK.split(value) if piece.strip())
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and function.get("name"):
            yield "tool_calls", str(function["name"])


def _matters(
    messages: Sequence[Message], i: int, key: str, whole: str, tokenizer: PreTrainedTokenizerBase, extras: Extras
) -> bool:  # fmt: skip
    """Whether the page would be another without a message's value: what others say may be written in another form, as JSON."""
    other = [*messages[:i], {**messages[i], key: "?"}, *messages[i + 1 :]]
    return page(other, tokenizer, extras) != whole
