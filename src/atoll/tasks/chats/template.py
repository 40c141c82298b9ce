"""A tokenizer's chat template at work, in bounded time: templates come with models, and are other people's programs."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from atoll.errors import TokenizerError
from atoll.tasks.rows import RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]

MOST_STEPS = 2_000_000
"""Lines that a template may execute for one page: a thousand times what long conversations take, and about a second."""
MOST_BYTES = 2**30
"""That a template may have while it writes a page."""
MOST_TEXT = 2**26
"""Characters of a page; a row comes to a quarter of it at most."""
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_LIMIT = threading.RLock()
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class Extras:
    """What a row gives a template besides its messages: `settings` are variables of the template, such as enable_thinking."""

    tools: Sequence[object] | None = None
    documents: Sequence[object] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


NO_EXTRAS = Extras()


def template_of(tokenizer: PreTrainedTokenizerBase, extras: Extras = NO_EXTRAS) -> str:
    """The text of the chat template; of several by name, the one for tools where there are tools, else the default.

    Raises: TokenizerError where there is none.
    """
    name = tokenizer.name_or_path or "the base"
    if not tokenizer.chat_template:
        raise TokenizerError(
            "the tokenizer has no chat template", where="[data] messages", got=f"the tokenizer of {name}",
            expected="a tokenizer_config.json or chat_template.jinja with a chat template",
            do="use a chat model as the base, or give prompt and completion columns instead of messages",
        )  # fmt: skip
    try:
        template = str(tokenizer.get_chat_template(None, extras.tools))  # type: ignore[arg-type]
    except ValueError:
        raise TokenizerError(
            "none of the tokenizer's chat templates is the default", where="[data] messages",
            got=", ".join(tokenizer.chat_template), expected='one named "default", or one alone',
            do=f"put the one to train with into the folder of {name} as chat_template.jinja",
        ) from None  # fmt: skip
    if _has_powers(template):
        raise _endless(f"the chat template of {name}, which has ** in it")
    return template


@cache
def _has_powers(template: str) -> bool:
    """Whether a template raises numbers to a power, which no page needs, and which takes for ever in one step: 9 ** 9 ** 9."""
    import jinja2

    try:
        return any(kind == "operator" and token == "**" for _, kind, token in jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:
        return False  # Told where the template is used.


def marks_answers(template: str) -> bool:
    """Whether the template says itself, with {% generation %}, what of its page the assistant says."""
    return _MARKS.search(template) is not None


def page(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras, *, open_turn: bool = False) -> str:
    """What the template writes of the messages; with `open_turn`, up to where the assistant begins to speak.

    Raises: RowProblem where the template refuses the messages; TokenizerError where there is no template, or a broken or endless one.
    """
    with _judged(tokenizer):
        template_of(tokenizer, extras)
        conversation: Any = [dict(message) for message in messages]
        given: Any = {"tools": extras.tools or None, "documents": extras.documents or None, **extras.settings}
        return _checked(str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=open_turn, **given)))


def marked_page(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, extras: Extras) -> tuple[str, list[tuple[int, int]]]:
    """The same with the places of what stands between {% generation %} and {% endgeneration %}, in characters.

    Raises: as page.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with _judged(tokenizer):
        conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given: Any = {"tools": extras.tools or None, "documents": extras.documents or None, **tokenizer.special_tokens_map}
        rendered: Any = render_jinja_template(
            [conversation], chat_template=template_of(tokenizer, extras), return_assistant_tokens_mask=True, **given | extras.settings
        )
        return _checked(str(rendered[0][0])), [(int(start), int(stop)) for start, stop in rendered[1][0]]


class _EndlessError(Exception):
    pass


def _checked(text: str) -> str:
    if len(text) > MOST_TEXT:
        raise MemoryError
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("half of a surrogate pair", "text that can be written as UTF-8", "") from None
    return text


def _endless(got: str) -> TokenizerError:
    return TokenizerError(
        "the chat template does not come to an end", where="[data] messages", got=got, expected="a template that writes a page at once",
        do="put a sound template into the base's folder as chat_template.jinja",
    )  # fmt: skip


@contextmanager
def _judged(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Tell what is wrong with the messages from what is wrong with the template."""
    import jinja2

    where, name = "[data] messages", f"the chat template of {tokenizer.name_or_path or 'the base'}"
    try:
        with _bounded(), _counted():
            yield
    except MemoryError:
        raise _endless(f"{name}, which takes {MOST_BYTES:,} bytes for one conversation, or writes {MOST_TEXT:,} letters") from None
    except _EndlessError:
        raise _endless(f"{name}, after {MOST_STEPS:,} steps on one conversation") from None
    except jinja2.TemplateSyntaxError as problem:
        raise TokenizerError(
            "the chat template cannot be read", where=where, got=f"{name}, line {problem.lineno}: {problem.message}",
            expected="a Jinja template", do="put a sound template into the base's folder as chat_template.jinja",
        ) from None  # fmt: skip
    except (jinja2.TemplateError, *_REFUSALS) as problem:
        raise RowProblem(f"messages that the chat template refuses: {problem}", "roles in the order that the model knows", "") from None


@contextmanager
def _bounded() -> Iterator[None]:
    """Within, this process gets at most so much memory more: 'a' * 10 ** 10 is one step. Systems that cannot say so are left alone."""
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        yield
        return
    with _LIMIT:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + MOST_BYTES
        if all(limit in (resource.RLIM_INFINITY, -1) or limit > most for limit in (soft, hard)):
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _counted() -> Iterator[None]:
    """Count the lines that Jinja's code executes: a limit in steps, unlike one in seconds, is the same on every machine."""
    import jinja2

    steps, lipsum = 0, jinja2.utils.generate_lorem_ipsum.__code__

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise _EndlessError
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        return line if code.co_filename == "<template>" or code is lipsum else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
