"""Tokenizers, special ids and chat templates of model directories: kept, used, and refused when damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from sqa import InputError, ModelConfig
from sqa.interop import export, import_model, open_source
from sqa.interop.text import SpecialIds

Make = Callable[..., ModelConfig]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture
def stock(config_of: Make, model_of, saved, tmp_path: Path) -> Path:
    """A directory of transformers with an id of its own for each end of a text, and no generation_config.json."""
    export(saved(model_of(config_of())), tmp_path / "stock", format="hf")
    folder = tmp_path / "stock"
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", bos_token_id=5, eos_token_id=[6, 7, 9], pad_token_id=8)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ids_of(path: Path) -> dict[str, object]:
    values = json.loads(path.read_text())
    return {name: values.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}


def test_special_ids_are_kept_without_generation_config(stock: Path, tmp_path: Path) -> None:
    expected = {"bos": 5, "eos": [6, 7, 9], "pad": 8}
    import_model(stock, tmp_path / "ours")
    assert ids_of(tmp_path / "ours" / "generation_config.json") == expected
    for source in (stock, tmp_path / "ours"):
        assert open_source(source).read_text_side().special == SpecialIds(bos=5, eos=(6, 7, 9), pad=8)
        export(source, tmp_path / f"{source.name}-hf", format="hf")
        for name in ("config.json", "generation_config.json"):
            assert ids_of(tmp_path / f"{source.name}-hf" / name) == expected
        export(source, tmp_path / f"{source.name}.gguf", format="gguf")
        fields = gguf.GGUFReader(tmp_path / f"{source.name}.gguf").fields
        names = ("bos", "eos", "eot", "eom", "padding")
        assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in names] == [5, 6, 7, 9, 8]


def test_a_text_begins_with_a_token_in_gguf_too(stock: Path, small_tokenizer, tmp_path: Path) -> None:
    """Also where another token ends it."""
    tokenizer = type(small_tokenizer).from_str(small_tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A b", special_tokens=[(token, tokenizer.token_to_id(token)) for token in "ab"]
    )
    tokenizer.save(str(stock / "tokenizer.json"))
    change(stock / "config.json", bos_token_id=tokenizer.token_to_id("a"))
    export(stock, tmp_path / "model.gguf", format="gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_generation_config_wins_and_keeps_its_other_fields(stock: Path, tmp_path: Path) -> None:
    (stock / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "temperature": 0.5}))
    import_model(stock, tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert values == {"temperature": 0.5, "bos_token_id": 5, "eos_token_id": 9, "pad_token_id": 8}


def test_ids_follow_from_the_tokens_that_tokenizer_config_names(stock: Path) -> None:
    change(stock / "config.json", bos_token_id=None, eos_token_id=None, pad_token_id=-1)
    change(stock / "tokenizer_config.json", eos_token={"content": "a"}, pad_token=None)
    text = open_source(stock).read_text_side()
    assert text.special == SpecialIds(eos=(text.tokenizer.token_to_id("a"),))


def test_a_template_over_several_lines_is_rendered_as_transformers_does(stock: Path) -> None:
    """Blocks on lines of their own, indented, leave no newline; JSON keeps its letters; loops can be left.

    Tools and documents are none, and not undefined. What the assistant says may be marked.
    """
    lines = (
        "{% if tools is not none or documents is not none %}[{{ tools[0] }}]{% endif %}",
        "{% for m in messages %}",
        "    {% if m['role'] == 'user' %}",
        "[{{ m['content'] | tojson }}{{ m['content'] | tojson(ensure_ascii=True) }}]",
        "    {% endif %}",
        "    {% break %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}",
        "{% generation %}[assistant]{% endgeneration %}:",
        "{% endif %}",
    )
    change(stock / "tokenizer_config.json", chat_template="\n".join(lines))
    chat = [{"role": "user", "content": "größer"}]
    theirs = AutoTokenizer.from_pretrained(stock).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    text = open_source(stock).read_text_side()
    assert text.encode_chat("größer") == theirs
    assert text.decode(theirs) == '["größer""gr\\u00f6\\u00dfer"]\n[assistant]:\n'


def test_a_tokenizer_that_was_saved_to_cut_and_to_pad_does_neither(stock: Path, small_tokenizer) -> None:
    changed = type(small_tokenizer).from_str(small_tokenizer.to_str())
    changed.enable_truncation(4)
    changed.enable_padding(length=8)
    changed.save(str(stock / "tokenizer.json"))
    text = open_source(stock).read_text_side()
    for sentence in ("return softmax(q @ k.T) @ v, 42 times", "def"):
        assert text.encode(sentence) == small_tokenizer.encode(sentence).ids


def test_of_several_templates_the_default_is_taken_and_a_file_of_its_own_wins(stock: Path) -> None:
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    change(stock / "tokenizer_config.json", chat_template=named)
    assert open_source(stock).read_text_side().chat_template == "b"
    (stock / "chat_template.jinja").write_text("c")
    assert open_source(stock).read_text_side().chat_template == "c"
    (stock / "chat_template.jinja").unlink()
    change(stock / "tokenizer_config.json", chat_template=named[:1])
    assert open_source(stock).read_text_side().chat_template is None


BAD = {
    "text": ({"eos_token_id": "two"}, "eos_token_id in .*config.json must be a token id or a list of them below 300"),
    "empty": ({"eos_token_id": []}, r"must be a token id or a list of them below 300, got \[\]"),
    "list of text": ({"eos_token_id": [1, "x"]}, r"got \[1, 'x'\]"),
    "beyond": ({"eos_token_id": 300}, "below 300, got 300"),
    "bool": ({"bos_token_id": True}, "bos_token_id .* must be a token id below 300, got True"),
    "list": ({"pad_token_id": [1]}, "pad_token_id .* must be a token id below 300"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_refused(name: str, file: str, stock: Path, tmp_path: Path) -> None:
    values, message = BAD[name]
    if file != "config.json":
        (stock / file).write_text("{}")
    change(stock / file, **values)
    for action in (lambda out: import_model(stock, out), lambda out: export(stock, out, format="hf")):
        with pytest.raises(InputError, match=message):
            action(tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"temperature": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_files_are_found_before_the_weights_are_read(
    file: str, content: bytes, stock: Path, tmp_path: Path
) -> None:
    (stock / file).write_bytes(content)
    (stock / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(InputError, match=file) as error:
        import_model(stock, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_links_to_other_places_are_refused(stock: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        path = stock / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to(outside)
        with pytest.raises(InputError, match=f"{name} is a link to another place"):
            export(stock, tmp_path / "out", format="hf")
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    path = stock / "chat_template.jinja"
    path.mkdir()
    with pytest.raises(InputError, match="must be a regular file"):
        export(stock, tmp_path / "out", format="hf")
    assert not list(tmp_path.glob("*out*"))


def test_links_of_the_hubs_cache_are_followed(stock: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in stock.iterdir():
        shutil.copyfile(path, cache / "blobs" / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-{path.name}")
    (cache / "blobs" / "hash-2").write_text("{{ tools }}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool_use.jinja").symlink_to("../../../blobs/hash-2")
    import_model(snapshot, tmp_path / "ours")
    assert not any(path.is_symlink() for path in (tmp_path / "ours").iterdir())
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    assert (tmp_path / "ours" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_templates_of_other_names_are_kept(stock: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(stock)
    import_model(stock, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs", format="hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template == tokenizer.chat_template


def sqa(*arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sqa", *arguments], capture_output=True, text=True)


def test_generate_runs_a_stock_directory_with_its_own_tokenizer(stock: Path, small_tokenizer) -> None:
    small_tokenizer = type(small_tokenizer).from_str(small_tokenizer.to_str())
    small_tokenizer.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 67)])
    small_tokenizer.save(str(stock / "tokenizer.json"))
    change(stock / "tokenizer_config.json", chat_template=TEMPLATE)
    source = open_source(stock)
    text, model = source.read_text_side(), source.load().eval()
    import torch

    assert text.encode("def")[0] == 67
    assert (
        text.encode_chat("x")
        == small_tokenizer.encode(f"{small_tokenizer.id_to_token(5)}[user]x[assistant]", add_special_tokens=False).ids
    )
    for options, ids in (((), text.encode("def attend")), (("--chat",), text.encode_chat("def attend"))):
        whole = model.generate(torch.tensor([ids]), max_new_tokens=8)[0].tolist()
        end = whole[len(ids) + 2]  # what the model says third ends the text
        change(stock / "config.json", eos_token_id=[0, end])
        done = sqa("generate", str(stock), "--prompt", "def attend", "--max-new-tokens", "8", *options)
        stop = whole.index(end, len(ids)) + 1
        assert done.stdout == text.decode(whole[len(ids) if options else 0 : stop]) + "\n", done.stderr


def test_generate_refuses_in_one_sentence(stock: Path) -> None:
    cases: list[tuple[tuple[str | bytes, ...], str]] = [
        (("--prompt", "x", "--chat"), "no chat template"),
        (("--prompt", ""), "--prompt must not be empty"),
        ((b"--prompt", b"\xff\xfe"), "--prompt must be UTF-8 text"),
    ]
    for arguments, message in cases:
        done = sqa("generate", str(stock), *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr
    for template in (
        "{% for",
        "{{ raise_exception('no\nsuch role') }}",
        "{{ messages.__class__.__mro__[1].x() }}",
        "{{ 'x' * 10**18 }}",  # a MemoryError, which has no text
    ):
        change(stock / "tokenizer_config.json", chat_template=template)
        with pytest.raises(InputError, match=r"chat template cannot be rendered: \S") as error:
            open_source(stock).read_text_side().encode_chat("x")
        assert "\n" not in str(error.value)
    (stock / "tokenizer.json").unlink()
    assert "no tokenizer.json" in sqa("generate", str(stock), "--prompt", "x").stderr
