"""Two tokenizers: the embedded base's, of bytes, and one with SentencePiece's ways."""

from functools import cache

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sharelora_serve.models.embedded import embedded_base_folder
from sharelora_serve.server.codec import TextCodec

_MARK = "\u2581"  # a space, as SentencePiece writes it


@cache
def byte_level() -> TextCodec:
    """SmolLM2's: every token is some bytes."""
    return TextCodec(AutoTokenizer.from_pretrained(embedded_base_folder()))


@cache
def byte_fallback() -> TextCodec:
    """As LLaMA 2's: characters, bytes for those it lacks, and no space before the first word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [_MARK, *"abcdefghijklmnopqrstuvwxyzäöü日本", "ab", f"{_MARK}a", f"{_MARK}ab"]
    merges = [("a", "b"), (_MARK, "a"), (_MARK, "ab")]
    tokenizer = Tokenizer(
        BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_MARK), normalizers.Replace(" ", _MARK)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return TextCodec(fast)
