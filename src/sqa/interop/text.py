"""The text side of a model: its tokenizer, its special token ids and its chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sqa.data.tokenizer import END_TOKEN, PAD_TOKEN
from sqa.errors import InputError, shown
from sqa.files import json_text, read_text, write_text
from sqa.records import read_json
from sqa.storage import regular_file

TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
_JSON = (TOKENIZER, CONFIG, GENERATION, "special_tokens_map.json")
FILES = (*_JSON, TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the tokens that begin a text, end it (the usual one first) and pad it; None and () if unknown."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The three fields as transformers' configs have them; null for an unknown id."""
        eos: int | list[int] | None = list(self.eos) if len(self.eos) > 1 else next(iter(self.eos), None)
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}

    def tokens(self, tokenizer: Tokenizer) -> dict[str, str | None]:
        """The known ids as tokens, under transformers' names."""
        ids = {"bos_token": self.bos, "eos_token": next(iter(self.eos), None), "pad_token": self.pad}
        return {name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """`tokenizer` is None for a model without one. `files` (text by name) belong beside each copy of the model."""

    tokenizer: Tokenizer | None = None
    special: SpecialIds = field(default_factory=SpecialIds)
    chat_template: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document in training text: that of <|endoftext|>, else of the usual end of a text."""
        named: int | None = self.tokenizer.token_to_id(END_TOKEN) if self.tokenizer is not None else None
        return next(iter(self.special.eos), None) if named is None else named

    def write(self, folder: Path) -> None:
        """Write `files` into a folder."""
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with a beginning token if the tokenizer adds one."""
        assert self.tokenizer is not None
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the chat template, up to where the answer begins.

        Raises InputError without a template, and for one that cannot be rendered.
        """
        assert self.tokenizer is not None
        if self.chat_template is None:
            raise InputError("--chat: this model has no chat template; leave --chat out")
        tokens = {name: token or "" for name, token in self.special.tokens(self.tokenizer).items()}
        text = _render(self.chat_template, [{"role": "user", "content": message}], tokens)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _render(template: str, messages: list[dict[str, str]], tokens: Mapping[str, str]) -> str:
    """Render a chat template as transformers does: sandboxed, without newlines after blocks."""
    import jinja2
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **tokens}
    try:
        return environment.from_string(template).render(given)
    except Exception as error:  # a template runs code of its own and can fail in any way
        why = shown(str(error) or type(error).__name__)
        raise InputError(f"--chat: the model's chat template cannot be rendered: {why}") from None


def text_side(
    tokenizer: Tokenizer, special: SpecialIds, max_seq_len: int | None, chat_template: str | None = None
) -> TextSide:
    """The text side of a tokenizer without files of its own. It gets files that transformers reads."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if max_seq_len is None else {"model_max_length": max_seq_len}),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **special.tokens(tokenizer),
    }
    files = {TOKENIZER: tokenizer.to_str(), CONFIG: json_text(values), GENERATION: json_text(special.to_dict())}
    if chat_template is not None:
        files[TEMPLATE] = chat_template
    return TextSide(tokenizer=tokenizer, special=special, chat_template=chat_template, files=files)


def read_text_side(
    directory: Path, values: Mapping[str, Any], *, vocab_size: int, max_seq_len: int | None = None
) -> TextSide:
    """The text side of a model directory whose config.json holds `values`; every file of it is read and checked.

    Special ids come from generation_config.json, else config.json, else from the tokens in tokenizer_config.json, else
    from our own tokens' names. Raises InputError for a file that is damaged or a link to another place, for ids that
    are no tokens, and for a tokenizer with more entries than the model.
    """
    paths = [*(directory / name for name in FILES), *sorted(directory.glob("additional_chat_templates/*.jinja"))]
    files = {str(path.relative_to(directory)): read_text(path) for path in paths if regular_file(path)}
    parsed = {name: read_json(directory / name) for name in _JSON if name in files}
    tokenizer = _parse_tokenizer(directory / TOKENIZER, files[TOKENIZER], vocab_size) if TOKENIZER in files else None
    stated = parsed.get(CONFIG, {})
    special = _special_ids(directory, values, parsed, tokenizer, vocab_size)
    template = files.get(TEMPLATE, _chat_template(directory / CONFIG, stated.get("chat_template")))
    if tokenizer is not None and CONFIG not in files:
        made = text_side(tokenizer, special, max_seq_len, template)
        files = {**made.files, **files}
    if special != SpecialIds():
        files[GENERATION] = json_text({**parsed.get(GENERATION, {}), **special.to_dict()})
    return TextSide(tokenizer=tokenizer, special=special, chat_template=template, files=files)


def _parse_tokenizer(path: Path, text: str, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"tokenizer: {path} is damaged: {shown(str(error))}") from None
    if (size := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        raise InputError(
            f"tokenizer: {path} has {size} entries, but the model's vocab_size is only {vocab_size}; "
            f"put the tokenizer it was trained with there"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_ids(
    directory: Path,
    values: Mapping[str, Any],
    parsed: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> SpecialIds:
    ours = {"bos": None, "eos": END_TOKEN, "pad": PAD_TOKEN}

    def find(name: str) -> tuple[int, ...]:
        for file, given in ((GENERATION, parsed.get(GENERATION, {})), ("config.json", values)):
            if (found := given.get(f"{name}_token_id")) is not None:
                return _checked_ids(
                    f"{name}_token_id in {directory / file}", found, several=name == "eos", size=vocab_size
                )
        if tokenizer is None:
            return ()
        token = parsed.get(CONFIG, {}).get(f"{name}_token", ours[name] if CONFIG not in parsed else None)
        token = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        return () if found is None else (found,)

    bos, eos, pad = (find(name) for name in ours)
    return SpecialIds(bos=next(iter(bos), None), eos=eos, pad=next(iter(pad), None))


def _checked_ids(what: str, given: Any, *, several: bool, size: int) -> tuple[int, ...]:
    ids = given if several and isinstance(given, list) and given else [given]
    if any(type(each) is not int or not -1 <= each < size for each in ids):
        wanted = "a token id or a list of them" if several else "a token id"
        raise InputError(f"model: {what} must be {wanted} below {size}, got {shown(repr(given))}")
    return tuple(each for each in ids if each >= 0)  # -1 stands for none in old files


def _chat_template(path: Path, given: Any) -> str | None:
    """The template of tokenizer_config.json, or of a list of named ones the default."""
    if isinstance(given, list):
        named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise InputError(f"model: chat_template in {path} must be text, got {shown(repr(given))}")
    return given
