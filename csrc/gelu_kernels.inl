// Included by one translation unit per instruction set, which defines VSPDF_WIDTH. Everything here is local to that
// unit: a function shared by name could be linked from the wrong instruction set.

#include <cstring>

#include "gelu.hpp"

namespace vspdf {
namespace {

constexpr int W = VSPDF_WIDTH;
typedef float V __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
inline V splat(float x) { return x - V{}; }

// gelu(x) / x and gelu'(x) are 1/2 and an odd function of x, which is x P(x^2) / Q(x^2) up to kEdge on both sides and
// +-1/2 beyond, where float32 knows no difference. One division, where an error function takes an exponential too.
// Fitted by least squares with weights that level the largest error, in float64; within 2e-7 in float32.
constexpr float kEdge = 6.f;
template <int P, int Q>
struct Odd {
    float p[P], q[Q];
};
constexpr Odd<6, 6> kValue[2] = {
    {{0.398942143f, 0.0368764438f, 0.00486282445f, 0.000199134913f, 6.51366736e-06f, 2.01559143e-08f},
     {1.f, 0.25909999f, 0.0303765759f, 0.00205738004f, 8.30789286e-05f, 1.13319061e-06f}},
    {{0.398942202f, 0.031137215f, 0.00368063129f, 0.000140443488f, 7.14289445e-06f, 2.40400411e-08f},
     {1.f, 0.245540187f, 0.0247810334f, 0.0013396939f, 7.81239869e-05f, 1.32044988e-06f}},
};
constexpr Odd<8, 7> kGrad[2] = {
    {{0.797884524f, -0.0180382282f, 0.0135690179f, 0.000285220187f, 3.20271574e-05f, 1.12192367e-06f, 1.30029694e-08f,
      -2.88801622e-11f},
     {1.f, 0.310725272f, 0.0455827378f, 0.00415020855f, 0.000258605141f, 1.0812184e-05f, 3.63633319e-07f}},
    {{0.797884464f, -0.0420223847f, 0.0130604291f, -0.000155182352f, 2.69017528e-05f, 4.20305611e-07f, 1.12844498e-08f,
      -3.27516278e-11f},
     {1.f, 0.282314897f, 0.0342275016f, 0.00207408355f, 0.000146615479f, 5.16346881e-06f, 2.33392413e-07f}},
};

template <int P, int Q>
inline V around_half(const Odd<P, Q>& odd, V x) {
    const V t = x * x;
    V p = splat(odd.p[P - 1]), q = splat(odd.q[Q - 1]);
#pragma GCC unroll 8
    for (int i = P - 2; i >= 0; --i) p = p * t + odd.p[i];
#pragma GCC unroll 8
    for (int i = Q - 2; i >= 0; --i) q = q * t + odd.q[i];
    const V inside = 0.5f + x * (p / q);
    return x > kEdge ? splat(1.f) : x < -kEdge ? splat(0.f) : inside;  // NaN stays NaN
}

// out[i] = fn(a[i], b[i]) by whole vectors, the last one too, so that a number's result does not depend on its place.
template <class Fn>
void each(float* out, const float* a, const float* b, int64_t n, const Fn& fn) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, fn(load(a + i), load(b + i)));
    float last[3][W] = {};
    const size_t rest = size_t(n - i) * sizeof(float);
    std::memcpy(last[0], a + i, rest);
    std::memcpy(last[1], b + i, rest);
    store(last[2], fn(load(last[0]), load(last[1])));
    std::memcpy(out + i, last[2], rest);
}

void value(float* out, const float* x, int64_t n, Gelu form) {
    const auto odd = kValue[int(form)];
    each(out, x, x, n, [&](V v, V) { return v * around_half(odd, v); });
}

void grad(float* dx, const float* dy, const float* x, int64_t n, Gelu form) {
    const auto odd = kGrad[int(form)];
    each(dx, dy, x, n, [&](V g, V v) { return g * around_half(odd, v); });
}

}  // namespace

extern const GeluKernels VSPDF_TABLE;
const GeluKernels VSPDF_TABLE = {value, grad};

}  // namespace vspdf
