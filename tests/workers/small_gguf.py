"""A GGUF file of two tensors, one of them quantised."""

from pathlib import Path

import gguf
import numpy as np

Q8_0 = gguf.GGMLQuantizationType.Q8_0
TENSORS = [  # name, elements, kind
    ("blk.0.ffn_up.weight", 3 * 64, Q8_0),
    ("output_norm.weight", 7, gguf.GGMLQuantizationType.F32),
]


def write_small_gguf(path: Path) -> Path:
    """Write it, with metadata of every shape."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_add_bos_token(True)
    writer.add_token_list(["<s>", "é", "ab"])
    writer.add_token_types([3, 1, 1])
    matrix = np.ones((3, 64), dtype=np.float32)
    writer.add_tensor(TENSORS[0][0], gguf.quantize(matrix, Q8_0), raw_dtype=Q8_0)
    writer.add_tensor(TENSORS[1][0], np.ones(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
