// cuBLASLt behind fast_linear.h. It thinks in columns: out^T = W x^T, W read across.

#include "fast_linear.h"

#include <cublasLt.h>

#include <compare>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "checks.h"
#include "launch.h"
#include "shared_library.h"

namespace alignpro::cuda {
namespace {

constexpr const char* kOp = "fast_linear";
constexpr int64_t kWorkspace = int64_t{32} << 20;  // what NVIDIA advises from sm_90 on
constexpr uint32_t kAlignment = 16;                // of a row: the library would expect 256

std::vector<std::string> names_in(const std::vector<std::string>& folders) {
  if (const char* given = std::getenv("ALIGNPRO_CUBLASLT"); given != nullptr) return {given};
  const std::string name = cat("libcublasLt.so.", CUBLAS_VER_MAJOR);
  std::vector<std::string> names = {name};
  for (const std::string& folder : folders) names.push_back(cat(folder, "/", name));
  return names;
}

// What one of the library's functions made.
template <typename T>
class Made {
 public:
  Made(T value, cublasStatus_t (*destroy)(T)) : value_(value), destroy_(destroy) {}
  Made(Made&& other) noexcept
      : value_(std::exchange(other.value_, nullptr)), destroy_(other.destroy_) {}
  Made& operator=(Made&&) = delete;
  ~Made() {
    if (value_ != nullptr) (void)destroy_(value_);
  }
  T get() const { return value_; }

 private:
  T value_;
  cublasStatus_t (*destroy_)(T);
};

// What decides an algorithm.
struct Key {
  int64_t outputs, inputs, rows;
  int64_t weight_ld, x_ld, residual_ld, out_ld;  // residual_ld 0: none
  DType dtype;
  bool bias;
  auto operator<=>(const Key&) const = default;
};

struct Plan {
  Made<cublasLtMatmulDesc_t> operation;
  Made<cublasLtMatrixLayout_t> weight, x, residual, out;
  cublasLtMatmulAlgo_t algorithm;
};

}  // namespace

class FastLibrary {
 public:
  explicit FastLibrary(const std::vector<std::string>& names)
      : library_("deterministic false: cuBLASLt", names,
                 "pip install nvidia-cublas (torch's CUDA build brings it), or set "
                 "ALIGNPRO_CUBLASLT to the file; or load with deterministic true") {}

 private:
  SharedLibrary library_;
  template <typename Function>
  Function* find(const char* name) const {
    return library_.symbol<Function>(cat("cublasLt", name).c_str());
  }

 public:
#define ALIGNPRO_FROM_LIBRARY(name) \
  decltype(cublasLt##name)* const name = find<decltype(cublasLt##name)>(#name)
  ALIGNPRO_FROM_LIBRARY(GetStatusString);
  ALIGNPRO_FROM_LIBRARY(Create);
  ALIGNPRO_FROM_LIBRARY(Destroy);
  ALIGNPRO_FROM_LIBRARY(Matmul);
  ALIGNPRO_FROM_LIBRARY(MatmulDescCreate);
  ALIGNPRO_FROM_LIBRARY(MatmulDescDestroy);
  ALIGNPRO_FROM_LIBRARY(MatmulDescSetAttribute);
  ALIGNPRO_FROM_LIBRARY(MatrixLayoutCreate);
  ALIGNPRO_FROM_LIBRARY(MatrixLayoutDestroy);
  ALIGNPRO_FROM_LIBRARY(MatmulPreferenceCreate);
  ALIGNPRO_FROM_LIBRARY(MatmulPreferenceDestroy);
  ALIGNPRO_FROM_LIBRARY(MatmulPreferenceSetAttribute);
  ALIGNPRO_FROM_LIBRARY(MatmulAlgoGetHeuristic);
#undef ALIGNPRO_FROM_LIBRARY

  void check(cublasStatus_t status, const char* doing) const {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    throw Unavailable(cat("cuda: ", kOp, ": ", doing, ": ", GetStatusString(status),
                          "; deterministic true does without cuBLASLt"));
  }
  template <typename Value>
  void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t which,
           const Value& value) const {
    check(MatmulDescSetAttribute(operation, which, &value, sizeof value), "describe a product");
  }
  Made<cublasLtMatrixLayout_t> layout(cudaDataType_t type, int64_t rows, int64_t cols,
                                      int64_t ld) const {
    cublasLtMatrixLayout_t made = nullptr;
    check(MatrixLayoutCreate(&made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols),
                             ld),
          "describe a matrix");
    return {made, MatrixLayoutDestroy};
  }
  cublasLtHandle_t handle() const { return handle_.get(); }
  Plan make_plan(const Key& key) const;

 private:
  cublasLtHandle_t make_handle() const {
    cublasLtHandle_t made = nullptr;
    check(Create(&made), "make a handle");
    return made;
  }
  cublasLtMatmulAlgo_t choose(const Plan& plan, const Key& key) const;

  Made<cublasLtHandle_t> handle_{make_handle(), Destroy};
  mutable std::mutex mutex_;
  mutable std::map<Key, cublasLtMatmulAlgo_t> chosen_;  // for all sessions of a model
};

Plan FastLibrary::make_plan(const Key& key) const {
  const cudaDataType_t type = key.dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
  cublasLtMatmulDesc_t operation = nullptr;
  check(MatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describe a product");
  Plan plan{
      {operation, MatmulDescDestroy},
      layout(type, key.inputs, key.outputs, key.weight_ld),
      layout(type, key.inputs, key.rows, key.x_ld),
      layout(type, key.outputs, key.rows, key.residual_ld == 0 ? key.out_ld : key.residual_ld),
      layout(type, key.outputs, key.rows, key.out_ld),
      {}};
  set(operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (key.bias) set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  const std::lock_guard lock(mutex_);
  auto found = chosen_.find(key);
  if (found == chosen_.end()) found = chosen_.emplace(key, choose(plan, key)).first;
  plan.algorithm = found->second;
  return plan;
}

cublasLtMatmulAlgo_t FastLibrary::choose(const Plan& plan, const Key& key) const {
  cublasLtMatmulPreference_t made = nullptr;
  check(MatmulPreferenceCreate(&made), "prefer");
  const Made<cublasLtMatmulPreference_t> preference(made, MatmulPreferenceDestroy);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
    check(MatmulPreferenceSetAttribute(made, which, &value, sizeof value), "prefer");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspace));
  for (const auto which :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(which, kAlignment);
  }
  // A sum in pieces is joined in float32, not in the output's dtype.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  check(MatmulAlgoGetHeuristic(handle(), plan.operation.get(), plan.weight.get(), plan.x.get(),
                               plan.residual.get(), plan.out.get(), made, 1, &best, &found),
        "choose an algorithm");
  require<Unavailable>(found != 0, "cuda: ", kOp, ": cuBLASLt has no algorithm for ", key.rows,
                       " x ", key.inputs, " x ", key.outputs, " in ", dtype_name(key.dtype),
                       "; load with deterministic true");
  return best.algo;
}

std::shared_ptr<const FastLibrary> open_fast_library(const std::vector<std::string>& folders) {
  return std::make_shared<const FastLibrary>(names_in(folders));
}

struct FastLinear::State {
  std::shared_ptr<const FastLibrary> library;
  ops::Buffer workspace;
  Stream stream;
  std::map<Key, Plan> plans = {};
};

FastLinear::FastLinear(std::shared_ptr<const FastLibrary> library, ops::Ops& ops, Stream stream)
    : state_(new State{std::move(library), ops::Buffer(ops, kWorkspace), stream}) {}
FastLinear::~FastLinear() = default;

void FastLinear::multiply(const Matrix& x, const Matrix& weight, float scale, const void* bias,
                          const Matrix& residual, const Matrix& out) {
  check_linear(kOp, x, weight, residual, out);
  if (x.rows == 0) return;
  State& s = *state_;
  const bool with_residual = residual.data != nullptr;
  const Key key{weight.rows, weight.cols, x.rows,
                weight.ld,   x.ld,        with_residual ? residual.ld : 0,
                out.ld,      x.dtype,     bias != nullptr};
  auto found = s.plans.find(key);
  if (found == s.plans.end()) found = s.plans.emplace(key, s.library->make_plan(key)).first;
  const Plan& plan = found->second;
  if (bias != nullptr)
    s.library->set(plan.operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const float beta = with_residual ? 1.0f : 0.0f;
  s.library->check(
      s.library->Matmul(s.library->handle(), plan.operation.get(), &scale, weight.data,
                        plan.weight.get(), x.data, plan.x.get(), &beta,
                        with_residual ? residual.data : out.data, plan.residual.get(), out.data,
                        plan.out.get(), &plan.algorithm, s.workspace.data(),
                        static_cast<size_t>(kWorkspace), static_cast<cudaStream_t>(s.stream)),
      "multiply");
}

}  // namespace alignpro::cuda
