// The ops of a build without CUDA: each says so, whatever it is called with.

#include <string>

#include "alignpro/core/error.h"
#include "cuda/ops.h"
#include "cuda_ops.h"

namespace py = pybind11;

void bind_cuda_ops(py::module_& m) {
  m.def("AttentionShape", [](const py::args&) { return py::none(); });
  for (const char* op : {"embedding",
                         "soft_rows",
                         "mix_rows",
                         "rms_norm",
                         "rms_norm_add",
                         "swiglu",
                         "geglu",
                         "linear",
                         "qk_norm",
                         "rope_kv_write",
                         "kv_copy",
                         "attention_decode",
                         "attention_prefill",
                         "linear_logprob",
                         "total_variation",
                         "head_sample",
                         "embedding_backward",
                         "qk_norm_backward",
                         "rms_norm_backward",
                         "swiglu_backward",
                         "geglu_backward",
                         "rope_backward",
                         "linear_backward",
                         "lora_backward",
                         "attention_backward",
                         "linear_logprob_backward"}) {
    m.def(op, [op](const py::args&, const py::kwargs&) {
      throw alignpro::Unavailable(
          alignpro::cat("cuda: ", op, ": ", alignpro::cuda::unavailable_reason()));
    });
  }
}
