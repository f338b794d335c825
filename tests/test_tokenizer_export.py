"""The exported tokenizer.json, read by Hugging Face's own libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.tokenizer import ByteTokenizer, Tokenizer, export_hf, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")
# Characters that Unicode has added of late: the two regular expression engines know other ones.
wild = st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs"]), max_size=40)
dense = st.text("aeths 'lr\n\r\t019,.<|bos>ü é\x00\xa0", max_size=60)


@pytest.fixture(scope="module", params=["bpe", "byte"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Path]:
    """A tokenizer, and the folder that it was exported to."""
    texts = [*make_texts(300), "it's we'll they'VE 12345 1,000 grüße  \n\n  é\r\n"] * 2
    ours = ByteTokenizer() if request.param == "byte" else train_tokenizer(texts, 500)
    folder = tmp_path_factory.mktemp(request.param)
    export_hf(ours, folder)
    return ours, folder


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(wild, dense, st.sampled_from(make_texts(20, seed=9))))
def test_it_encodes_and_decodes_as_ours(both: tuple[Tokenizer, Path], text: str) -> None:
    ours, folder = both
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.encode(text).ids == [ours.bos_id, *ids]
    assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_special_tokens_have_our_ids_and_never_come_out_of_text(
    both: tuple[Tokenizer, Path],
) -> None:
    transformers = pytest.importorskip("transformers")
    ours, folder = both
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.special_tokens} == (
        ours.special_tokens
    )
    text = "a <|bos|> and <|assistant_end|>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.bos_id)
