// The three products of the compiled kernels against double, without Python, on every instruction set that the machine
// has: what `.ci/aarch64` runs under an emulator.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/plan.hpp"

using namespace vspdf;
using Numbers = std::vector<float>;

static std::mt19937 draw(1);

static Numbers numbers(size_t n) {
    Numbers found(n);
    for (float& x : found) x = std::normal_distribution<float>()(draw);
    return found;
}

static bool near(const char* product, const Numbers& found, const std::vector<double>& wanted) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        error += std::pow(found[i] - wanted[i], 2);
        norm += std::pow(wanted[i], 2);
    }
    const bool good = error <= 1e-10 * norm;  // NaN is not
    if (!good) std::printf("%s: relative error %g\n", product, std::sqrt(error / norm));
    return good;
}

static bool check(Isa isa, bool jit, int out, int in, double density, int tokens) {
    std::vector<uint8_t> bits((size_t(out) * in + 7) / 8);
    std::vector<int> kept;
    for (int i = 0; i < out * in; ++i) {
        if (std::uniform_real_distribution<>()(draw) >= density) continue;
        bits[i / 8] |= uint8_t(1 << i % 8);
        kept.push_back(i);
    }
    const Plan plan(out, in, bits.data(), isa, jit);
    const Numbers x = numbers(size_t(tokens) * in), dy = numbers(size_t(tokens) * out), values = numbers(kept.size());
    Numbers y(size_t(tokens) * out, NAN), dx(size_t(tokens) * in, NAN), dvalues(kept.size(), NAN);
    std::vector<double> wanted_y(y.size()), wanted_dx(dx.size()), wanted_dvalues(kept.size());
    for (int t = 0; t < tokens; ++t) {
        for (size_t i = 0; i < kept.size(); ++i) {
            const size_t row = size_t(t) * out + kept[i] / in, col = size_t(t) * in + kept[i] % in;
            wanted_y[row] += double(values[i]) * x[col];
            wanted_dx[col] += double(values[i]) * dy[row];
            wanted_dvalues[i] += double(dy[row]) * x[col];
        }
    }
    constexpr Dtype f32 = Dtype::f32;
    plan.forward(y.data(), x.data(), in, values.data(), nullptr, tokens, f32, f32, 1);
    plan.grad_input(dx.data(), dy.data(), out, values.data(), tokens, f32, f32, 1);
    plan.grad_values(dvalues.data(), dy.data(), out, x.data(), in, tokens, f32, f32, 1);
    return near("forward", y, wanted_y) & near("grad_input", dx, wanted_dx) &
           near("grad_values", dvalues, wanted_dvalues);
}

static int run(Isa isa, bool jit) {
    int cases = 0, wrong = 0;
    const int shapes[][2] = {{1, 1}, {1, 70}, {70, 1}, {17, 33}, {64, 64}, {130, 71}, {71, 300}, {300, 20}, {257, 129}};
    for (const auto& shape : shapes) {
        for (double density : {0.0, 0.05, 0.3, 1.0}) {
            for (int tokens : {1, 3, 16, 37, 65, 130}) {
                ++cases;
                if (check(isa, jit, shape[0], shape[1], density, tokens)) continue;
                ++wrong;
                std::printf("  in %d x %d, density %g, %d tokens\n", shape[0], shape[1], density, tokens);
            }
        }
    }
    std::printf("%s%s: %d of %d cases wrong\n", isa_name(isa), jit ? ", generated code" : "", wrong, cases);
    return wrong;
}

int main() {
    int wrong = 0;
    for (Isa isa : isas()) {
        wrong += run(isa, false);
        if (isa != Isa::plain) wrong += run(isa, true);
    }
    return wrong != 0;
}
