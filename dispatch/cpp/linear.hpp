// A linear layer of a C++ server: weights packed once for each kernel that a package may choose for it, and the call
// that launches what was chosen. What the package's own kernels do not serve is left to the caller's default.
#ifndef DKS_LINEAR_HPP
#define DKS_LINEAR_HPP

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "abi.h"
#include "package.hpp"
#include "serving.hpp"

namespace dks {

// A float as bf16, to nearest, ties to even; NaN stays NaN.
inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

using Packed = std::unique_ptr<void, decltype(&std::free)>;

// weight (n, k) -> (ceil(n / panel), ceil(k / step) * step / group, panel, group) of Element, zeros where n or k end;
// 64-byte aligned. Raises std::bad_alloc.
template <class Element, class Convert>
Packed pack(const float* weight, std::int64_t n, std::int64_t k, const Kernel& form, Convert convert) {
  const std::int64_t panels = (n + form.panel - 1) / form.panel, depth = (k + form.step - 1) / form.step * form.step;
  const std::size_t bytes = static_cast<std::size_t>(panels * form.panel * depth) * sizeof(Element);
  Packed memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory.get(), 0, bytes);
  auto* out = static_cast<Element*>(memory.get());
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t i = 0; i < k; ++i) {
      const std::int64_t panel = row / form.panel, group = i / form.group;
      const std::int64_t at = ((panel * depth / form.group + group) * form.panel + row % form.panel) * form.group;
      out[at + i % form.group] = convert(weight[row * k + i], row);
    }
  }
  return memory;
}

// Weights as one form of panels has them, with what belongs to it.
struct Form {
  Packed weight{nullptr, &std::free};
  std::vector<float> scale;        // int8: of a row; weight is about int8 * scale
  std::vector<std::int32_t> sums;  // int8: of a row's integers
};

// A form that `kernel` reads. Raises std::bad_alloc; std::runtime_error where integers are wanted and a weight is NaN
// or infinite.
inline Form make_form(const float* weight, std::int64_t n, std::int64_t k, const Kernel& kernel) {
  Form form;
  if (kernel.weights == Weights::f32) {
    form.weight = pack<float>(weight, n, k, kernel, [](float value, std::int64_t) { return value; });
  } else if (kernel.weights == Weights::bf16) {
    form.weight = pack<std::uint16_t>(weight, n, k, kernel, [](float value, std::int64_t) { return to_bf16(value); });
  } else {  // symmetric, a scale a row, as dks/dispatch/ops/linear/quantize.py does it
    for (std::int64_t row = 0; row < n; ++row) {
      float largest = 0;
      for (std::int64_t i = 0; i < k; ++i) {
        const float size = std::fabs(weight[row * k + i]);
        if (!std::isfinite(size)) throw std::runtime_error("weight: found NaN or infinity, expected finite values");
        largest = std::max(largest, size);
      }
      form.scale.push_back(std::max(largest, 1e-30f) / 127.0f);
    }
    form.sums.assign(static_cast<std::size_t>(n), 0);
    form.weight = pack<std::int8_t>(weight, n, k, kernel, [&form](float value, std::int64_t row) {
      const float scaled = std::nearbyint(value / form.scale[static_cast<std::size_t>(row)]);
      const auto whole = static_cast<std::int8_t>(std::max(-127.0f, std::min(127.0f, scaled)));
      form.sums[static_cast<std::size_t>(row)] += whole;
      return whole;
    });
  }
  return form;
}

// y = epilogue(x @ weight.T + bias), bound to one package. It copies its weights and never looks at the caller's again:
// after a write to those, make another one and let it serve in the place of this.
class Linear {
 public:
  // Arguments: traits, "bias=...,dtype=...,epilogue=..." as the table has them; weight (n, k) and bias (n) or null, in
  // fp32 also where dtype is bfloat16; both are copied.
  //
  // Raises std::bad_alloc; std::runtime_error where the traits ask for a bias and there is none, or the reverse; and
  // as make_form() does.
  Linear(const Package& package, std::string_view traits, const float* weight, const float* bias, std::int64_t n,
         std::int64_t k)
      : group_(group_of(package.table(), "linear", "prepared", traits, {n, k})), n_(n), k_(k),
        element_(has(traits, "dtype=float32") ? 4 : 2), adds_(has(traits, "epilogue=add")) {
    if (has(traits, "bias=yes") != (bias != nullptr))
      throw std::runtime_error("linear: found traits " + std::string(traits) + (bias ? " and a bias" : " and no bias") +
                               ", expected both or neither");
    if (group_ < 0) return;  // nothing was measured for this layer: every call is a miss
    if (bias != nullptr) bias_.assign(bias, bias + n);
    const Group& group = package.table().groups[group_];
    std::size_t cells = 1;
    for (std::int32_t dim = 0; dim < group.dims; ++dim) cells *= static_cast<std::size_t>(group.edges[dim].count);
    for (std::int32_t i = 0; i < group.class_count; ++i)
      for (std::size_t cell = 0; cell < cells; ++cell)
        bind(package, group.classes[i].cells[cell], epilogue(traits), weight);
  }

  // Index of its group in the package's table, -1 where there is none.
  std::int32_t group() const { return group_; }

  // Serves x (m, k) -> y (m, n), rows contiguous; residual (m, n) with the epilogue add, else null. False where the
  // caller's default must serve, y being undefined; counted either way.
  template <class Guard>
  bool run(const Guard& call, const void* x, const void* residual, void* y, std::int64_t m) const {
    const auto bits = [](const void* p) { return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(p)); };
    const auto strides = static_cast<std::uint64_t>((n_ | k_) * element_);
    const Choice choice = call.choose(group_, &m, 1, alignment(bits(x) | bits(residual) | bits(y) | strides));
    if (!choice.hit) return false;
    const Bound* bound = choice.rule < first_ + static_cast<std::int32_t>(rules_.size()) && choice.rule >= first_
                             ? &rules_[static_cast<std::size_t>(choice.rule - first_)]
                             : nullptr;
    if (bound == nullptr || bound->launch == nullptr || adds_ != (residual != nullptr)) {
      call.note(group_, Outcome::unsupported);
      return false;
    }
    const int code = bound->launch(&bound->constant, x, residual, y, m);
    if (code == DKS_OK) return true;
    if (code == DKS_DECLINED) call.note(group_, Outcome::declined);
    else call.report_failure(group_, choice.rule);
    return false;
  }

 private:
  struct Bound {
    dks_linear_fn launch = nullptr;
    dks_linear constant{};
  };

  static bool has(std::string_view traits, std::string_view one) { return traits.find(one) != std::string_view::npos; }

  static std::int32_t epilogue(std::string_view traits) {
    constexpr std::string_view names[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "add"};
    const std::size_t at = traits.find("epilogue=");
    const std::string_view name = at == std::string_view::npos ? "" : traits.substr(at + 9, traits.find(',', at) - at - 9);
    const auto* found = std::find(std::begin(names), std::end(names), name);
    return static_cast<std::int32_t>(found - std::begin(names));
  }

  void bind(const Package& package, std::int32_t rule, std::int32_t epilogue, const float* weight) {
    const Kernel* kernel = rule < 0 ? nullptr : package.kernel(rule);
    if (kernel == nullptr || kernel->kind != Kind::linear || kernel->weights == Weights::other || epilogue > DKS_ADD)
      return;
    if (rules_.empty()) first_ = rule;
    if (rule < first_) {
      rules_.insert(rules_.begin(), static_cast<std::size_t>(first_ - rule), Bound{});
      first_ = rule;
    }
    if (rule >= first_ + static_cast<std::int32_t>(rules_.size())) rules_.resize(static_cast<std::size_t>(rule - first_) + 1);
    const auto form = std::make_tuple(kernel->weights, kernel->panel, kernel->group, kernel->step);
    auto held = forms_.find(form);
    if (held == forms_.end()) held = forms_.emplace(form, make_form(weight, n_, k_, *kernel)).first;
    dks_linear constant{};
    constant.weight = held->second.weight.get();
    constant.bias = bias_.empty() ? nullptr : bias_.data();
    constant.scale = held->second.scale.empty() ? nullptr : held->second.scale.data();
    constant.sums = held->second.sums.empty() ? nullptr : held->second.sums.data();
    constant.n = n_;
    constant.k = k_;
    constant.epilogue = epilogue;
    constant.threads = kernel->threads;
    constant.by_rows = kernel->by_rows;
    rules_[static_cast<std::size_t>(rule - first_)] = {reinterpret_cast<dks_linear_fn>(package.function(*kernel)), constant};
  }

  std::int32_t group_, first_ = 0;
  std::int64_t n_, k_, element_;
  bool adds_;
  std::vector<float> bias_;
  std::vector<Bound> rules_;  // by rule, from first_
  std::map<std::tuple<Weights, std::int32_t, std::int32_t, std::int32_t>, Form> forms_;
};

}  // namespace dks

#endif  // DKS_LINEAR_HPP
