// Operator asr_downstream::lstm_heads: the LSTMs of all heads and directions over all sequences, on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "lstm.h"

namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t KINDS = 4;  // weight_ih, weight_hh, bias_ih, bias_hh of a direction

// A direction: where it reads, where it writes, which way.
struct Job {
  int64_t head, offset;
  bool reverse;
};

template <typename T>
void run(const Tensors& tokens, const Tensors& weights, const std::vector<Job>& jobs, const Tensors& out) {
  std::vector<asr_lstm::Direction<T>> directions;
  int64_t groups = 0, width = 0, inputs = 0;
  for (size_t n = 0; n < jobs.size(); n++) {
    const at::Tensor* own = &weights[KINDS * n];
    directions.push_back({own[0].const_data_ptr<T>(), own[1].const_data_ptr<T>(), own[2].const_data_ptr<T>(),
                          own[3].const_data_ptr<T>(), own[1].size(1), own[0].size(1), jobs[n].reverse});
    groups = std::max(groups, directions[n].groups());
    width = std::max(width, directions[n].width);
    inputs = std::max(inputs, directions[n].inputs);
  }
  // A task is a direction over a block of sequences. Blocks are as even as can be, and enough for all threads.
  const int64_t batch = tokens[0].size(0), length = tokens[0].size(1), count = jobs.size();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t full = (batch + asr_lstm::BLOCK - 1) / asr_lstm::BLOCK, busy = (threads + count - 1) / count;
  const int64_t blocks = std::min(batch, std::max(full, busy)), tasks = count * blocks;
  std::atomic<int64_t> next{0};  // directions differ in width: a thread that is done takes the next task
  at::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    asr_lstm::Workspace space(groups, width, inputs);
    int64_t packed = -1;
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t n = task / blocks, block = task % blocks;
      const int64_t first = batch * block / blocks, here = batch * (block + 1) / blocks - first;
      const at::Tensor &x = tokens[jobs[n].head], &y = out[jobs[n].head];
      if (n != packed) asr_lstm::pack(directions[n], space);
      packed = n;
      asr_lstm::run(directions[n], space, x.const_data_ptr<T>() + first * x.stride(0), x.stride(0), x.stride(1), here,
                    length, y.mutable_data_ptr<T>() + first * y.stride(0) + jobs[n].offset, y.stride(0), y.stride(1));
    }
  });
}

Tensors lstm_heads(at::TensorList tokens, at::TensorList weights, at::IntArrayRef heads,
                   const c10::List<bool>& reverse) {
  TORCH_CHECK(!tokens.empty(), "lstm_heads: no tokens");
  TORCH_CHECK(heads.size() == reverse.size() && weights.size() == KINDS * heads.size(),
              "lstm_heads: expected a head, a direction and ", KINDS, " weights for each LSTM, got ", heads.size(),
              " heads, ", reverse.size(), " directions and ", weights.size(), " weights");
  Tensors x, w, out;
  for (const at::Tensor& own : tokens) {
    TORCH_CHECK(own.dim() == 3 && own.size(0) == tokens[0].size(0) && own.size(1) == tokens[0].size(1),
                "lstm_heads: expected tokens (B, N, inputs) of one batch and length, got ", own.sizes(), " beside ",
                tokens[0].sizes());
    x.push_back(own.stride(2) == 1 ? own : own.contiguous());
  }
  const at::ScalarType dtype = x[0].scalar_type();
  std::vector<int64_t> widths(x.size(), 0);
  std::vector<Job> jobs;
  for (size_t n = 0; n < heads.size(); n++) {
    const int64_t head = heads[n];
    TORCH_CHECK(head >= 0 && head < static_cast<int64_t>(x.size()), "lstm_heads: there is no head ", head);
    const at::Tensor* own = &weights[KINDS * n];
    TORCH_CHECK(own[1].dim() == 2, "lstm_heads: weight_hh should have two dimensions, got ", own[1].sizes());
    const int64_t width = own[1].size(1);
    const std::vector<int64_t> sizes[] = {{4 * width, x[head].size(2)}, {4 * width, width}, {4 * width}, {4 * width}};
    for (int64_t kind = 0; kind < KINDS; kind++) {
      TORCH_CHECK(own[kind].sizes() == at::IntArrayRef(sizes[kind]), "lstm_heads: weight ", kind, " of LSTM ", n, " should be ",
                  at::IntArrayRef(sizes[kind]), ", got ", own[kind].sizes());
      w.push_back(own[kind].contiguous());
    }
    jobs.push_back({head, widths[head], reverse.get(n)});
    widths[head] += width;
  }
  for (const Tensors& all : {x, w})
    for (const at::Tensor& own : all)
      TORCH_CHECK(own.scalar_type() == dtype && own.device().is_cpu(), "lstm_heads: expected tensors of ", dtype,
                  " on the CPU, got ", own.scalar_type(), " on ", own.device());
  for (size_t n = 0; n < x.size(); n++)
    out.push_back(at::empty({x[n].size(0), x[n].size(1), widths[n]}, x[n].options()));
  if (jobs.empty() || x[0].size(0) == 0 || x[0].size(1) == 0) return out;
  switch (dtype) {
    case at::kFloat:
      run<float>(x, w, jobs, out);
      break;
    case at::kBFloat16:
      run<at::BFloat16>(x, w, jobs, out);
      break;
    case at::kHalf:
      run<at::Half>(x, w, jobs, out);
      break;
    default:
      TORCH_CHECK(false, "lstm_heads: takes float32, bfloat16 and float16, got ", dtype);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(asr_downstream, library) {
  library.def("lstm_heads(Tensor[] tokens, Tensor[] weights, int[] heads, bool[] reverse) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(asr_downstream, CPU, library) { library.impl("lstm_heads", &lstm_heads); }
