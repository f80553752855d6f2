"""Turns texts into token ids. Every stage encodes the texts that a model continues or scores here.

A prompt is a template, ours or the tokenizer's, filled with values from data. In a template, the text of a special
token is that token. In a value it is plain text, whoever wrote it: otherwise an answer's `<|im_end|>` would end a turn,
and the text after it would speak for somebody else. Therefore values are guarded before they enter a template:

    value "Say </s> now."  guard ->  "Say <|/s> now."  tokenize ->  [Say] [ <] + [/] [s] [>] [ now] [.]

where | is a character that no text has (`SENTINEL`). Text between sentinels is encoded piece by piece. The tokenizer
encodes a text without sentinels unchanged.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from salmon import templates
from salmon.border import reason
from salmon.config import PolicyPrompt, PpoTexts, Scored
from salmon.errors import UserError

SENTINEL = "\ufdd0"
"""A noncharacter: Unicode excludes it from interchanged texts."""

DATE = "strftime_now"
"""The function with which chat templates write the date. As a template variable: the day that it treats as today."""
# The same function for a given day, put before a chat template: transformers accepts variables but not functions.
_GIVEN_DATE = (
    "{%- macro strftime_now(format) -%}{%- set ns = namespace(text=format) -%}"
    "{%- for code, value in given_date.items() -%}{%- set ns.text = ns.text.replace(code, value) -%}{%- endfor -%}"
    "{{- ns.text -}}{%- endmacro %}\n"
)

_SOME_QUESTION = "Is it so?"
_UNLIKE = ("Is it so?", "a", "7", "(")  # instructions whose tokens share no beginning
# Opening markers of thinking, with any name and brackets: <think>, [THINK], <seed:think>, ◁think▷.
_OPENS_THINKING = re.compile(r"([<\[◁])([\w:]*think[\w:]*)([>\]▷])", flags=re.I)


@dataclass(frozen=True, slots=True)
class _Traits:
    """Properties of a tokenizer.

    Attributes:
        special: text -> id of the tokens that decoding drops.
        control: matches the first character of a control token's text; None if there is no such token.
        first_characters: the first characters of those texts.
        prefix: number of special tokens put before a text.
        suffix: number of special tokens put after it.
        is_spaced: whether a text is encoded as if a space came before it (SentencePiece).
    """

    special: Mapping[str, int]
    control: re.Pattern[str] | None
    first_characters: frozenset[str]
    prefix: int
    suffix: int
    is_spaced: bool


def guard(tokenizer: PreTrainedTokenizerBase, value: str) -> str:
    """Mark a value from data: `tokenize` then encodes the control tokens in it as plain text.

    Control tokens are the special tokens, and the added tokens that begin and end with a mark, as `<think>` and
    `[INST]` do: they also steer the model. Added words and white space are ordinary text. A token of a single character
    is not marked, because there is no other way to encode it.
    """
    traits = _traits(tokenizer)
    value = value.replace(SENTINEL, "")
    if traits.control is None or traits.first_characters.isdisjoint(value):
        return value
    return traits.control.sub(rf"\g<0>{SENTINEL}", value)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of texts that a model continues or scores.

    The end token that a tokenizer appends is removed, because the text continues. A text that already begins with the
    token that the tokenizer prepends gets it only once.

    Args:
        tokenizer: the model's tokenizer.
        texts: filled templates, their values guarded (see `guard`).
        add_special_tokens: whether the tokenizer prepends its own tokens; a chat template includes them itself.

    Returns:
        One list of ids per text.
    """
    whole = iter(_encode(tokenizer, [text for text in texts if SENTINEL not in text], add_special_tokens))
    rows = []
    for text in texts:
        if SENTINEL not in text:
            rows.append(next(whole))
            continue
        first, *others = text.split(SENTINEL)
        [row] = _encode(tokenizer, [first], add_special_tokens)
        rows.append(row + [token for piece in others for token, _ in _continue(tokenizer, piece)])
    return rows


def count_tokens(tokenizer: PreTrainedTokenizerBase, values: Sequence[str]) -> list[int]:
    """Number of tokens of each value from data, including the token that the tokenizer prepends."""
    return list(map(len, tokenize(tokenizer, [guard(tokenizer, value) for value in values])))


def token_spans(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """First and past-the-last character of every token of each text, guarded or not. Special tokens are omitted.

    Raises:
        UserError: if the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no token offsets; use a fast tokenizer")
    plain = [text for text in texts if SENTINEL not in text]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": True}
    found = iter(tokenizer(plain, **options)["offset_mapping"] if plain else [])
    rows = []
    for text in texts:
        if SENTINEL not in text:
            rows.append(next(found))
            continue
        first, *others = text.split(SENTINEL)
        spans = list(tokenizer(first, **options)["offset_mapping"])
        start = len(first)
        for piece in others:
            start += len(SENTINEL)
            spans += [(start + begin, start + end) for _, (begin, end) in _continue(tokenizer, piece)]
            start += len(piece)
        rows.append(spans)
    return rows


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """The tokens that decoding drops, by their text."""
    return _traits(tokenizer).special


def begins_thinking(tokenizer: PreTrainedTokenizerBase, prompt: PolicyPrompt, preamble: str) -> bool:
    """Whether the policy's prompt ends inside a thinking section that the response continues."""
    if prompt.thinking is None:
        return False
    opening, closing = prompt.thinking
    # The preamble or a system turn may mention the markers.
    _, _, after = prompt_text(tokenizer, _SOME_QUESTION, prompt, preamble).rpartition(_SOME_QUESTION)
    return after.rfind(opening) > after.rfind(closing)


def first_special_token(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int] | None:
    """The first special token that a text names, and the character at which it begins; None if it names none."""
    special = _traits(tokenizer).special
    found = [(place, -len(name), name) for name in special if name and (place := text.find(name)) >= 0]
    return (special[min(found)[2]], min(found)[0]) if found else None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, instruction: str, prompt: PolicyPrompt, preamble: str
) -> list[int]:
    """Token ids of the prompt that the policy continues, special tokens included.

    Args:
        tokenizer: the policy's tokenizer.
        instruction: with its input, if any (`text.join_instruction`).
        prompt: names the assistant's turn marker, or `chat`.
        preamble: text of the template file (see `read_preamble`).

    Raises:
        UserError: if the tokenizer has no chat template, or the template refuses the prompt.
    """
    return encode_dialogue(tokenizer, [instruction], prompt, preamble)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[str], prompt: PolicyPrompt, preamble: str
) -> list[int]:
    """The same for a dialogue: alternating turns of user and policy, with the user first and last."""
    text = dialogue_text(tokenizer, said, prompt, preamble)
    return tokenize(tokenizer, [text], add_special_tokens=not prompt.is_chat)[0]


def tokens_and_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Tokens of a text that continues a prompt, and the number of characters of the text up to the end of each token.

    Args:
        tokenizer: the model's tokenizer; if it is not a fast one, the numbers are 0.
        text: the text, its values guarded.
    """
    found, start = [], 0
    for piece in text.split(SENTINEL):
        found += [(token, start + end if end else 0) for token, (_, end) in _continue(tokenizer, piece)]
        start += len(piece) + len(SENTINEL)
    return found


def shared_tokens(tokenizer: PreTrainedTokenizerBase, prompt: PolicyPrompt, preamble: str) -> int:
    """Number of tokens that begin every prompt of the policy: beginning token, preamble, the user's marker."""
    prompts = [encode_prompt(tokenizer, text, prompt, preamble) for text in _UNLIKE]
    return len(os.path.commonprefix(prompts))  # noqa: RUF071 (token by token is what we want)


def check_query_length(tokenizer: PreTrainedTokenizerBase, ppo: PpoTexts, prompt: PolicyPrompt) -> None:
    """Refuse a prompt limit that leaves no room for an instruction."""
    around = len(encode_prompt(tokenizer, "", prompt, read_preamble(prompt)))
    if around >= ppo.query_length:
        raise UserError(
            f"ppo.query_length is {ppo.query_length}, and policy_prompt.template takes {around} tokens of it: no "
            "instruction fits; raise ppo.query_length, or shorten the template"
        )


@dataclass(frozen=True, slots=True)
class Template:
    """A template for a model that scores texts.

    Attributes:
        text: the template, with slots.
        is_chat: whether it is already a chat, with a chat's special tokens.
    """

    text: str
    is_chat: bool = False

    @classmethod
    def of(cls, template: "str | Template") -> "Template":
        """The template itself; plain text becomes a template that is not a chat."""
        return cls(template) if isinstance(template, str) else template

    def encode(self, tokenizer: PreTrainedTokenizerBase, filled: Sequence[str]) -> list[list[int]]:
        """Token ids of filled texts of this template."""
        return tokenize(tokenizer, filled, add_special_tokens=not self.is_chat)


def read_template(tokenizer: PreTrainedTokenizerBase, file: str | Path, form: Scored, key: str) -> Template:
    """The template in a file, as `as_template` makes it.

    Raises:
        UserError: as for `as_template`, or if the file cannot be read.
    """
    return as_template(tokenizer, templates.read(file), form, key, f"template {file}")


def as_template(tokenizer: PreTrainedTokenizerBase, text: str, form: Scored, key: str, name: str) -> Template:
    """The template for a model that scores texts, as a chat if the settings say so.

    It becomes a chat before it is filled. The chat template therefore never touches the values, and filled texts are
    cut, packed and counted like any others. If the chat template opens the assistant's turn with thinking
    (DeepSeek-R1), an empty thinking section is closed before the template's last line, so the verdict follows directly.

    Args:
        tokenizer: the model's tokenizer.
        text: the template's text.
        form: its format, and the chat template's variables.
        key: the configuration key of the format, for messages.
        name: the template's name, for messages.

    Raises:
        UserError: if the tokenizer has no chat template, or the template does not fit it.
    """
    if form.format == "text":
        return Template(text)
    if not tokenizer.chat_template:
        raise UserError(f"{key} is `chat`, but the tokenizer has no chat template; set it to `text`")
    try:
        system, user, begun = templates.turns(text)
    except UserError as error:
        raise UserError(f"{key} is `chat`, but {name} does not fit: {error}") from None
    why = ""
    # Some chat templates refuse a system turn, or omit it.
    joined = f"{system}\n\n{user}" if system else user
    for parts in ({"system": system, "user": user}, {"user": joined}) if system else ({"user": user},):
        try:
            chat = render(tokenizer, parts, form.template_variables)
        except _RefusedError as error:
            why = str(error)
            continue
        if all(part.strip() in chat for part in parts.values()):
            return Template(_close_thinking(chat, parts["user"].strip()) + begun, is_chat=True)
        why = "it changes the text"
    raise UserError(
        f"{key} is `chat`, but the tokenizer's chat template does not accept {name} ({why}); check its variables "
        f"in the same section, or set {key} to `text`"
    )


def read_preamble(prompt: PolicyPrompt) -> str:
    """Text of the policy's template file; empty for `chat`."""
    return "" if prompt.is_chat else templates.read(prompt.template)


def prompt_text(tokenizer: PreTrainedTokenizerBase, instruction: str, prompt: PolicyPrompt, preamble: str) -> str:
    """The text of the policy's prompt, the instruction guarded; see `encode_prompt`."""
    return dialogue_text(tokenizer, [instruction], prompt, preamble)


def dialogue_text(tokenizer: PreTrainedTokenizerBase, said: Sequence[str], prompt: PolicyPrompt, preamble: str) -> str:
    """The same for a dialogue; see `encode_dialogue`."""
    said = [guard(tokenizer, text) for text in said]
    if not prompt.is_chat:
        return templates.policy_dialogue(preamble, prompt.assistant_marker, said)
    if not tokenizer.chat_template:
        raise UserError("policy_prompt.template is `chat`, but the tokenizer has no chat template; name a file")
    try:
        return render(tokenizer, list(zip(cycle(("user", "assistant")), said)), prompt.template_variables)
    except _RefusedError as error:
        raise UserError(
            f"the tokenizer's chat template refuses a prompt of {len(said)} turns ({error}); check "
            "policy_prompt.template_variables, or name a file in policy_prompt.template"
        ) from None


class _RefusedError(UserError):
    """A chat template did not accept the turns."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Mapping[str, str] | Sequence[tuple[str, str]],
    variables: Mapping[str, Any],
    *,
    begin: bool = True,
) -> str:
    """The text that the chat template makes from turns (role -> text).

    Args:
        tokenizer: holds the template.
        turns: the turns in order; as pairs if a role has several.
        variables: the template's variables.
        begin: whether to begin the assistant's turn after them.

    Raises:
        UserError: if the template does not accept them, or writes today's date.
    """
    messages = [
        {"role": role, "content": text} for role, text in (turns.items() if isinstance(turns, Mapping) else turns)
    ]
    try:
        texts = {
            tokenizer.apply_chat_template(messages, add_generation_prompt=begin, tokenize=False, **options)
            for options in _by_day(tokenizer, variables)
        }
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise _RefusedError(reason(error)) from error
    if len(texts) > 1:
        raise _RefusedError(
            "it writes the date, so prompts would change from day to day; set the template's own variable for it "
            f'(Llama 3: date_string), or set {DATE} to a day such as "2026-01-31", which it then treats as today'
        )
    text: str = texts.pop()
    return text


def chat_options(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `apply_chat_template` other than the turns, for libraries that call it themselves.

    Args:
        tokenizer: holds the template.
        variables: the template's variables.

    Raises:
        UserError: if the tokenizer has no template, or its template refuses a user's turn or writes today's date.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template")
    render(tokenizer, {"user": _SOME_QUESTION}, variables)
    return _by_day(tokenizer, variables)[0]


def _by_day(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options of `apply_chat_template`; for several different days if the text may depend on the day."""
    options = dict(variables)
    if DATE not in str(tokenizer.chat_template):
        return [options]
    options["chat_template"] = _GIVEN_DATE + tokenizer.get_chat_template()
    fixed = options.pop(DATE, None)
    days = [date.fromisoformat(fixed)] if fixed else [date(1999, 12, 31), date(2022, 2, 1)]
    return [{**options, "given_date": _date_codes(day)} for day in days]


def _date_codes(day: date) -> dict[str, str]:
    """Values of the `strftime` codes on a day, at midnight."""
    codes = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSuUVwWxXyYzZ" for flag in ("", "-")]
    return {code: day.strftime(code) for code in codes}


def _close_thinking(chat: str, said: str) -> str:
    """A rendered chat whose assistant's turn, after the user's text, does not begin inside a thinking section."""
    turn = chat.rpartition(said)[2]
    opened = list(_OPENS_THINKING.finditer(turn))
    closing = "{}/{}{}".format(*opened[-1].groups()) if opened else ""
    return f"{chat.rstrip()}\n\n{closing}\n\n" if opened and closing not in turn[opened[-1].end() :] else chat


def _traits(tokenizer: PreTrainedTokenizerBase) -> _Traits:
    """Properties of a tokenizer, determined once for each tokenizer in use."""
    # A tokenizer can change. Usually it then has more tokens, or one of two relevant settings differs.
    state = (len(tokenizer), *(getattr(tokenizer, f"add_{name}_token", None) for name in ("bos", "eos")))
    return _find_traits(tokenizer, state)


@lru_cache(maxsize=8)
def _find_traits(tokenizer: PreTrainedTokenizerBase, state: tuple[object, ...]) -> _Traits:
    """See `_traits`."""
    added = tokenizer.added_tokens_decoder
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {token.content: number for number, token in added.items() if token.special}
    control = {*special, *(token.content for token in added.values() if _is_marked(token.content))}
    control = {text for text in control if len(text) > 1}
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    places = [place for place in range(len(full)) if bare and full[place : place + len(bare)] == bare]
    prefix, suffix = (places[-1], len(full) - len(bare) - places[-1]) if places else (0, 0)
    return _Traits(
        special=special,
        control=re.compile(rf"(?={_alternatives(control)})(?s:.)") if control else None,
        first_characters=frozenset(text[0] for text in control),
        prefix=prefix,
        suffix=suffix,
        is_spaced=bool(bare) and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(("▁", "Ġ")),
    )


def _is_marked(text: str) -> bool:
    """Whether a text begins and ends with a mark: not a letter, digit or space (which SentencePiece writes as ▁)."""
    return not any(end.isalnum() or end.isspace() or end == "▁" for end in (text[0], text[-1]))


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern that matches any of the texts."""
    return "|".join(map(re.escape, sorted(texts)))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of texts without sentinels, from the tokenizer, without its end token and a repeated first token."""
    if not texts:  # the tokenizer refuses an empty list
        return []
    rows: list[list[int]] = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]
    if not add_special_tokens:
        return rows
    traits = _traits(tokenizer)
    if traits.suffix:
        rows = [row[: -traits.suffix] for row in rows]
    if traits.prefix:
        bos = tokenizer.bos_token_id
        rows = [row[1:] if row[:2] == [bos, bos] else row for row in rows]
    return rows


def _continue(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[tuple[int, tuple[int, int]]]:
    """Tokens of a piece that continues another piece, with their positions in it (0, 0 if unknown)."""
    if not piece:
        return []
    if not tokenizer.is_fast:
        return [(token, (0, 0)) for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    # If texts get a leading space, a line break absorbs it and is then removed, provided that it is a separate token.
    for lead in ("\n", "") if _traits(tokenizer).is_spaced else ("",):
        found = tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
        own = [(token, (begin - len(lead), end - len(lead))) for token, (begin, end) in tokens if end > len(lead)]
        if not lead or (own and own[0][1][0] == 0):
            break
    return own
