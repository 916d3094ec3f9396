"""The tokenizer of a GGUF file, rebuilt for the `tokenizers` library from its vocabulary, merges and scores.

`tokenizer.ggml.pre` names how text is split before merging; the table follows llama.cpp's src/llama-vocab.cpp.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sqa.errors import InputError, shown
from sqa.interop.gguf_reader import GgufFile
from sqa.interop.text import SpecialIds, TextSide, text_side

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# the regular expression that splits text; None is GPT-2's own, "digits" splits single digits off before it
_SPLITS: dict[str | None, tuple[str, ...]] = {
    None: ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "modern-bert"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}": (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
    ),
    rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}|{_TAIL}": (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2",
    ),
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED}": ("tekken",),
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHED}": ("gpt-4o", "llama4", "kanana2"),
}  # fmt: skip
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
# with these, a word that is a token stays whole whatever the merges, and a text begins with the bos token by default
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2", "tekken")
_NFC = ("qwen2", "deepseek-r1-qwen")  # Qwen's tokenizer composes characters first; GGUF files do not say so
_UNUSED, _CONTROL, _USER_DEFINED = 5, 3, 4  # of gguf.TokenType
_KEYS = "tokenizer.ggml"


def read_text_side(file: GgufFile, *, vocab_size: int, max_seq_len: int) -> TextSide:
    """The text side of a GGUF file; empty without a tokenizer. Raises InputError for one that cannot be built."""
    kind = file.get(f"{_KEYS}.model", str)
    special = SpecialIds(
        bos=_token_id(file, "bos", vocab_size),
        eos=tuple(
            dict.fromkeys(i for name in ("eos", "eot", "eom") if (i := _token_id(file, name, vocab_size)) is not None)
        ),
        pad=_token_id(file, "padding", vocab_size),
    )
    if kind in (None, "none", "no_vocab"):
        return TextSide(special=special)
    if kind not in _BUILDERS:
        raise InputError(
            f"tokenizer: {file.path} has a tokenizer of kind {shown(kind)}; {' and '.join(_BUILDERS)} can be built"
        )
    tokens = _texts(file, "tokens")
    if len(tokens) > vocab_size:
        raise InputError(f"tokenizer: {file.path} has {len(tokens)} tokens, but its embedding only {vocab_size} rows")
    types = file.get(f"{_KEYS}.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"tokenizer: {file.path} has {len(tokens)} tokens, but {len(types)} types of them")
    try:
        tokenizer = _build(file, kind, special.bos, tokens, types)
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"tokenizer: that of {file.path} cannot be built: {shown(str(error))}") from None
    return text_side(tokenizer, special, max_seq_len, file.get("tokenizer.chat_template", str))


def _build(file: GgufFile, kind: str, bos_id: int | None, tokens: list[str], types: list[int]) -> Tokenizer:
    vocab = {token: i for i, (token, each) in enumerate(zip(tokens, types, strict=True)) if each != _UNUSED}
    tokenizer, adds_bos = _BUILDERS[kind](file, vocab)
    for wanted, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        named = [token for token, each in zip(tokens, types, strict=True) if each == wanted]
        add([AddedToken(token, normalized=False, special=wanted == _CONTROL) for token in named])
    if bos_id is not None and file.get(f"{_KEYS}.add_bos_token", bool, adds_bos):
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _token_id(file: GgufFile, name: str, vocab_size: int) -> int | None:
    found: int | None = file.get(f"{_KEYS}.{name}_token_id", int)
    if found is not None and not 0 <= found < vocab_size:
        raise InputError(f"tokenizer: {name}_token_id in {file.path} must be below {vocab_size}, got {found}")
    return found


def _texts(file: GgufFile, name: str) -> list[str]:
    values = file.get(f"{_KEYS}.{name}", list, [])
    if any(type(value) is not str for value in values) or not values:
        raise InputError(f"tokenizer: {_KEYS}.{name} in {file.path} must be a list of texts")
    return values


def _byte_level(file: GgufFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether a text begins with the bos token unless the file says otherwise."""
    pre = file.get(f"{_KEYS}.pre", str, "default")
    if pre not in _SPLIT_OF:
        raise InputError(
            f"tokenizer: {file.path} splits text as {shown(pre)} does, which is not known here "
            f"(known: {', '.join(sorted(_SPLIT_OF))})"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _texts(file, "merges"))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _splitter(_SPLIT_OF[pre])
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre in _WHOLE_WORDS


def _splitter(split: str | None) -> Any:
    if split is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    first: Any
    if split == "digits":
        first, by_regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        first, by_regex = pre_tokenizers.Split(Regex(split), behavior="isolated"), False
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)])


def pre_of(tokenizer: Tokenizer) -> str | None:
    """The name in `tokenizer.ggml.pre` for how this byte-level tokenizer splits text; None if there is none.

    There is none without merges either: llama.cpp reads no file that lacks them.
    """
    values = json.loads(tokenizer.to_str())
    model, normalizer = values["model"], (values.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or not model["merges"] or normalizer not in (None, "NFC"):
        return None
    own = _parts(values.get("pre_tokenizer") or {})
    whole, composed = bool(model.get("ignore_merges")), normalizer == "NFC"
    return next(
        (
            name
            for split, names in _SPLITS.items()
            if _parts(json.loads(_splitter(split).__getstate__())) == own
            for name in names
            if (name in _WHOLE_WORDS, name in _NFC) == (whole, composed)
        ),
        None,
    )


def _parts(splitter: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without the option that affects only offsets."""
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def _sentencepiece(file: GgufFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """BPE over characters with a fallback to bytes, as in Llama 2 and Mistral; merges are in the order of scores."""
    scores = file.get(f"{_KEYS}.scores", list)
    if scores is None or any(not 0 <= i < len(scores) for i in vocab.values()):
        raise InputError(f"tokenizer: {file.path} lacks the scores of its tokens ({_KEYS}.scores)")
    ranked = [
        (-scores[i], -at, at - len(token), i, token[:at], token[at:])
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = "<unk>" if "<unk>" in vocab else None
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.get(f"{_KEYS}.add_space_prefix", bool, True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
