"""Fine-tune Qwen3-Embedding on labelled sentence pairs.

    python examples/qwen3_pairs.py                              # on a GPU, downloads Qwen3-Embedding-0.6B
    python examples/qwen3_pairs.py --model path/of/a/model --pairs pairs.jsonl --epochs 4

The LoRA has rank 8 and alpha 16 on the query, key and value projections. The labels are 0 and 1, and the objective is a
cosine similarity equal to the label. The embedding is that of the last token, as in Qwen3-Embedding's own training.
"""

import argparse
from pathlib import Path

import numpy as np
from peft import LoraConfig

from llama_index_lora_embed import LabelledPairs, LoraEmbedding, LoraFinetuneEngine

HERE = Path(__file__).parent


def similarities(embed_model: LoraEmbedding, pairs: LabelledPairs) -> np.ndarray:
    """Cosine similarity of each pair, float [pairs]."""
    first, second = (np.asarray(embed_model.get_text_embedding_batch(texts)) for texts in (pairs.texts1, pairs.texts2))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / lengths


def main() -> None:
    """Fine-tune, and print the similarities before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-Embedding-0.6B", help="Hub id or folder of the base")
    parser.add_argument("--pairs", default=str(HERE / "sentence_pairs.jsonl"), help="JSONL or CSV with labels 0 and 1")
    parser.add_argument("--output", default="runs/qwen3-pairs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()

    train, held_out = LabelledPairs.from_file(arguments.pairs).split(0.3, seed=0)
    engine = LoraFinetuneEngine(
        train,
        model_id=arguments.model,
        model_output_path=arguments.output,
        val_dataset=held_out,
        objective="cosine",
        pooling="lasttoken",
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"]),
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        evaluation_steps=0,  # 0: after each epoch
        device=arguments.device,
    )
    before = similarities(
        LoraEmbedding(base_model=arguments.model, pooling="lasttoken", device=arguments.device), held_out
    )
    result = engine.finetune()
    after = similarities(engine.get_finetuned_model(), held_out)

    print("label  before  after")
    for text1, text2, label, old, new in zip(
        held_out.texts1, held_out.texts2, held_out.scores, before, after, strict=True
    ):
        print(f"{label:5.0f}  {old:6.3f}  {new:5.3f}  {text1} | {text2}")
    for entry in result.history:
        print(f"step {entry['step']:4d}: ROC-AUC {entry['metrics']['roc_auc']:.3f}")
    print(result)


if __name__ == "__main__":
    main()
