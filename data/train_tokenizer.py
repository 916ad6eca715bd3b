"""Train the workbook's tokenizer: byte-level BPE, 4,096 tokens, on both training splits.

Byte-level: every text in every language can be written, there is no unknown token. Source of the
method: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units",
2016, arXiv 1508.07909; on bytes: Radford et al., 2019 (GPT-2).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from effnb.lab import corpora

FOLDER = Path(__file__).resolve().parent / "models" / "tokenizer"
VOCABULARY = 4096
END = "<|endoftext|>"


def main() -> None:
    """Train on both corpora, the novels read twice (they are a quarter of the text)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    novels = corpora.documents("novels", "train")
    texts = [*novels, *novels, *corpora.documents("packages", "train")]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
    )
    fast.save_pretrained(FOLDER)
    print(f"{len(fast):,} tokens; saved to {FOLDER.name}/")


if __name__ == "__main__":
    main()
