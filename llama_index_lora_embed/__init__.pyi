from .config import FinetuneConfig as FinetuneConfig
from .core import LoraEmbedError as LoraEmbedError
from .data import EmbeddingQAFinetuneDataset as EmbeddingQAFinetuneDataset
from .data import LabelledPairs as LabelledPairs
from .data import generate_qa_embedding_pairs as generate_qa_embedding_pairs
from .embedding import AdapterEmbeddingModel as AdapterEmbeddingModel
from .embedding import LoraEmbedding as LoraEmbedding
from .engines import EmbeddingAdapterFinetuneEngine as EmbeddingAdapterFinetuneEngine
from .engines import FinetuneResult as FinetuneResult
from .engines import LoraFinetuneEngine as LoraFinetuneEngine
from .engines import SentenceTransformersFinetuneEngine as SentenceTransformersFinetuneEngine
from .engines import run_finetune as run_finetune
from .evaluation import compare_retrieval as compare_retrieval
from .evaluation import evaluate_retrieval as evaluate_retrieval
from .models.embedding_adapter import BaseAdapter as BaseAdapter
from .models.embedding_adapter import LinearLayer as LinearLayer
from .models.embedding_adapter import LowRankLayer as LowRankLayer
from .models.embedding_adapter import TwoLayerNN as TwoLayerNN

__version__: str
