// Python sees addresses as integers (tensor.data_ptr(), 0 for none); the GIL is released while an operation runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

namespace py = pybind11;
using Address = std::uintptr_t;

// The number in megatronish/native.py: changed together whenever arguments change, so that an old build is not called.
constexpr int kInterface = 3;

template <typename T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef MEGATRONISH_CPU
#include "cpu/bpe.h"
#include "cpu/cpu.h"

PYBIND11_MODULE(_cpu, m) {
  using namespace megatronish;
  m.doc() = "Native CPU operations; addresses are integers, 0 for none.";
  m.attr("interface") = kInterface;
  m.def(
      "adamw",
      [](Address master, int master_kind, Address gradient, Address exp_avg, Address exp_avg_sq, int moments, Address low, int low_kind,
         int64_t n, Address scalars, Address segments, int64_t num_segments, double lr, double beta1, double beta2, double eps,
         double weight_decay, bool stochastic, bool zero_gradient, int threads) {
        const AdamWTensors tensors{at<void>(master),  master_kind,       at<float>(gradient), at<void>(exp_avg), at<void>(exp_avg_sq), moments,
                                   at<uint16_t>(low), low_kind, stochastic, zero_gradient};
        const AdamWSegments rows{at<const Segment>(segments), num_segments};
        const AdamW options{lr, beta1, beta2, eps, weight_decay};
        if (master_kind == kFloat64)
          adamw_float64(tensors, n, at<const double>(scalars), rows, options, threads);
        else
          adamw_float32(tensors, n, at<const float>(scalars), rows, options, threads);
      },
      py::arg("master"), py::arg("master_kind"), py::arg("gradient"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("moments"),
      py::arg("low"), py::arg("low_kind"), py::arg("n"), py::arg("scalars"), py::arg("segments"), py::arg("num_segments"), py::kw_only(),
      py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("stochastic"),
      py::arg("zero_gradient"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "square_sum",
      [](const std::vector<std::pair<Address, int64_t>>& tensors, bool is_float64, int threads) {
        if (is_float64) {
          std::vector<std::pair<const double*, int64_t>> given;
          for (auto [address, size] : tensors) given.emplace_back(at<const double>(address), size);
          return square_sum_float64(given, threads);
        }
        std::vector<std::pair<const float*, int64_t>> given;
        for (auto [address, size] : tensors) given.emplace_back(at<const float>(address), size);
        return square_sum_float32(given, threads);
      },
      py::arg("tensors"), py::arg("is_float64"), py::kw_only(), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_uint16",
      [](Address source, int64_t size, Address offsets, int64_t rows, int64_t width, Address out, int threads) {
        return gather_uint16(at<const uint16_t>(source), size, at<const int64_t>(offsets), rows, width, at<int64_t>(out), threads);
      },
      py::arg("source"), py::arg("size"), py::arg("offsets"), py::arg("rows"), py::arg("width"), py::arg("out"), py::kw_only(),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "gather_int32",
      [](Address source, int64_t size, Address offsets, int64_t rows, int64_t width, Address out, int threads) {
        return gather_int32(at<const int32_t>(source), size, at<const int64_t>(offsets), rows, width, at<int64_t>(out), threads);
      },
      py::arg("source"), py::arg("size"), py::arg("offsets"), py::arg("rows"), py::arg("width"), py::arg("out"), py::kw_only(),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "permute",
      [](Address values, int64_t n, uint64_t size, uint64_t rows, uint64_t columns, Address keys, int num_rounds) {
        permute(at<uint64_t>(values), n, size, rows, columns, at<const uint64_t>(keys), num_rounds);
      },
      py::arg("values"), py::arg("n"), py::arg("size"), py::arg("rows"), py::arg("columns"), py::arg("keys"), py::arg("num_rounds"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "megatron_sample_index",
      [](Address lengths, int64_t num_lengths, Address documents, int64_t num_documents, int64_t sequence_length, int64_t num_samples,
         Address out) {
        megatron_sample_index(at<const int32_t>(lengths), num_lengths, at<const int32_t>(documents), num_documents, sequence_length,
                              num_samples, at<int64_t>(out));
      },
      py::arg("lengths"), py::arg("num_lengths"), py::arg("documents"), py::arg("num_documents"), py::arg("sequence_length"),
      py::arg("num_samples"), py::arg("out"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "megatron_blend_index",
      [](Address weights, int64_t num_sources, int64_t size, Address source, Address number) {
        megatron_blend_index(at<const double>(weights), num_sources, size, at<int16_t>(source), at<int64_t>(number));
      },
      py::arg("weights"), py::arg("num_sources"), py::arg("size"), py::arg("source"), py::arg("number"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "keep_bits",
      [](Address samples, int64_t num_samples, int64_t start, int64_t count, int64_t key, int64_t threshold, Address out, int threads) {
        keep_bits(at<const int64_t>(samples), num_samples, start, count, key, threshold, at<uint8_t>(out), threads);
      },
      py::arg("samples"), py::arg("num_samples"), py::arg("start"), py::arg("count"), py::arg("key"), py::arg("threshold"),
      py::arg("out"), py::kw_only(), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  py::class_<BpeEncoder>(m, "BpeEncoder")
      .def(py::init([](Address classes, Address byte_ids, Address merges, int64_t num_merges) {
             return new BpeEncoder(at<const uint8_t>(classes), at<const int32_t>(byte_ids), at<const int32_t>(merges), num_merges);
           }),
           py::arg("classes"), py::arg("byte_ids"), py::arg("merges"), py::arg("num_merges"))
      .def(
          "encode",
          [](BpeEncoder& self, Address text, Address ends, int64_t num_texts, Address out, Address counts) {
            return self.encode(at<const uint8_t>(text), at<const int64_t>(ends), num_texts, at<int32_t>(out), at<int64_t>(counts));
          },
          py::arg("text"), py::arg("ends"), py::arg("num_texts"), py::arg("out"), py::arg("counts"),
          py::call_guard<py::gil_scoped_release>());
}
#endif

#ifdef MEGATRONISH_CUDA
#include "cuda/cuda.h"

// Of attention: S, B, H, G, K; addresses of queries, keys, values; of each its strides in elements of S, B and heads.
using Sizes = std::array<int64_t, 5>;
using Inputs = std::array<Address, 3>;
using Strides = std::array<std::array<int64_t, 3>, 3>;

static megatronish::AttentionShape attention_shape(int dtype, const Sizes& s) {
  return {s[0], s[1], s[2], s[3], s[4], megatronish::Dtype(dtype)};
}

static megatronish::AttentionInputs attention_inputs(const Inputs& inputs, const Strides& strides) {
  megatronish::AttentionInputs a{at<void>(inputs[0]), at<void>(inputs[1]), at<void>(inputs[2]), {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    a.q_stride[i] = strides[0][i];
    a.k_stride[i] = strides[1][i];
    a.v_stride[i] = strides[2][i];
  }
  return a;
}

PYBIND11_MODULE(_cuda, m) {
  using namespace megatronish;
  m.doc() = "Native CUDA operations on the current device; addresses and the stream are integers, 0 for none.";
  m.attr("interface") = kInterface;
  m.def("device_count", &device_count, py::call_guard<py::gil_scoped_release>());
  m.def(
      "adamw",
      [](Address master, int master_kind, Address gradient, Address exp_avg, Address exp_avg_sq, int moments, Address low, int low_kind,
         int64_t n, Address scalars, Address segments, int64_t num_segments, double lr, double beta1, double beta2, double eps,
         double weight_decay, bool stochastic, bool zero_gradient, Address stream) {
        const AdamWSlice slice{at<void>(master),  master_kind, at<void>(gradient), at<void>(exp_avg), at<void>(exp_avg_sq), moments,
                               at<void>(low),     low_kind,    n,                  at<void>(scalars), at<const int64_t>(segments),
                               num_segments,      stochastic,  zero_gradient};
        adamw_cuda(slice, {lr, beta1, beta2, eps, weight_decay}, at<void>(stream));
      },
      py::arg("master"), py::arg("master_kind"), py::arg("gradient"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("moments"),
      py::arg("low"), py::arg("low_kind"), py::arg("n"), py::arg("scalars"), py::arg("segments"), py::arg("num_segments"), py::kw_only(),
      py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("stochastic"),
      py::arg("zero_gradient"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.attr("sum_block") = kSumBlock;
  m.def(
      "square_sum",
      [](const std::vector<std::pair<Address, int64_t>>& tensors, bool is_float64, Address partials, Address out, Address stream) {
        std::vector<std::pair<const void*, int64_t>> given;
        for (auto [address, size] : tensors) given.emplace_back(at<const void>(address), size);
        square_sum_cuda(given, is_float64, at<double>(partials), at<double>(out), at<void>(stream));
      },
      py::arg("tensors"), py::arg("is_float64"), py::arg("partials"), py::arg("out"), py::kw_only(), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "attention_forward",
      [](int dtype, const Sizes& sizes, const Inputs& inputs, const Strides& strides, Address out, Address lse, double scale,
         Address stream) {
        attention_forward(attention_shape(dtype, sizes), attention_inputs(inputs, strides), at<void>(out), at<float>(lse), scale,
                          at<void>(stream));
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("inputs"), py::arg("strides"), py::arg("out"), py::arg("lse"), py::kw_only(),
      py::arg("scale"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "attention_backward",
      [](int dtype, const Sizes& sizes, const Inputs& inputs, const Strides& strides, Address dout, Address out, Address lse,
         Address delta, Address dq, Address dk, Address dv, double scale, Address stream) {
        attention_backward(attention_shape(dtype, sizes), attention_inputs(inputs, strides),
                           {at<void>(dout), at<void>(out), at<float>(lse), at<float>(delta), at<void>(dq), at<void>(dk), at<void>(dv)},
                           scale, at<void>(stream));
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("inputs"), py::arg("strides"), py::arg("dout"), py::arg("out"), py::arg("lse"),
      py::arg("delta"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::kw_only(), py::arg("scale"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "norm_forward",
      [](int dtype, int64_t rows, int64_t D, Address x, Address residual, Address weight, Address bias, Address y, Address sum,
         Address mean, Address rstd, double eps, Address stream) {
        norm_forward({Dtype(dtype), rows, D, at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), at<void>(y),
                      at<void>(sum), at<float>(mean), at<float>(rstd), eps},
                     at<void>(stream));
      },
      py::arg("dtype"), py::arg("rows"), py::arg("D"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
      py::arg("y"), py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::kw_only(), py::arg("eps"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  m.def("norm_parts", [](int dtype, int64_t rows, int64_t D, bool center) { return norm_parts(rows, D, Dtype(dtype), center); },
        py::arg("dtype"), py::arg("rows"), py::arg("D"), py::arg("center"));
  m.def(
      "norm_backward",
      [](int dtype, int64_t rows, int64_t D, int64_t parts, Address dy, Address dsum, Address x, Address weight, Address mean,
         Address rstd, Address dx, Address dweight, Address dbias, Address dweight_parts, Address dbias_parts, Address stream) {
        norm_backward({Dtype(dtype), rows, D, parts, at<void>(dy), at<void>(dsum), at<void>(x), at<void>(weight), at<float>(mean),
                       at<float>(rstd), at<void>(dx), at<void>(dweight), at<void>(dbias), at<float>(dweight_parts),
                       at<float>(dbias_parts)},
                      at<void>(stream));
      },
      py::arg("dtype"), py::arg("rows"), py::arg("D"), py::arg("parts"), py::arg("dy"), py::arg("dsum"), py::arg("x"), py::arg("weight"),
      py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dweight_parts"),
      py::arg("dbias_parts"), py::kw_only(), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif
