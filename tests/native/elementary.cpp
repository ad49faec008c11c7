// The CPU's elementary functions against double over the whole range of float, and the tiles' behaviour at the ends
// of arrays. Prints one line per failure; exits with their number. Compiled and run by tests/native/test_core.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/scalar.h"
#include "cpu/thread.h"

using namespace ntm;
using namespace ntm::cpu;
using M = Math<float>;
using V = M::V;
constexpr int W = lanes<float>;

static int failures = 0;

static float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Distance in units of the last place of the exact answer, which for denormals is the smallest denormal. From NaN it is
// infinite, not NaN, with which no comparison holds.
static double ulps(float got, double exact) {
    if (got != got) return std::numeric_limits<double>::infinity();
    const double unit = std::ldexp(1.0, std::max(std::ilogb(exact == 0 ? 1e-300 : exact) - 23, -149));
    return std::fabs(got - exact) / unit;
}

template <class F, class G>
static void check(const char* name, F function, G exact, double bound, bool (*inside)(float)) {
    double worst = 0;
    float where = 0;
    std::uint32_t bits = 0;
    for (long k = 0; k < (1L << 32) / 499; k += W) {
        V x;
        for (int i = 0; i < W; ++i, bits += 499) {
            const float value = from_bits(bits);
            x[i] = inside(value) ? value : 0.5f;
        }
        const V y = function(x);
        for (int i = 0; i < W; ++i) {
            const double want = exact(double(x[i]));
            if (static_cast<float>(want) == y[i]) continue;  // infinities too
            // The ends of the exponentials without AVX-512: below 2^-126.5 they vanish, above 2^127.5 they overflow.
            if (register_bytes < 64 && y[i] == 0 && x[i] < -80 && std::fabs(want) < std::exp2(-126.5)) continue;
            if (register_bytes < 64 && y[i] == M::infinity && x[i] > 80 && want > std::exp2(127.5)) continue;
            const double error = ulps(y[i], want);
            if (!(error <= worst)) worst = error, where = x[i];
        }
    }
    std::printf("%-9s at most %.2f ulp, at %a\n", name, worst, where);
    if (!(worst <= bound)) {
        std::printf("FAILED: %s is off by %.2f ulp at %a, bound %.2f\n", name, worst, where, bound);
        ++failures;
    }
}

static void expect(bool condition, const char* what) {
    if (condition) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

int main() {
    // Two ulp: what a sum of rounded terms may lose; torch's own vectorised functions promise one.
    check("exp", [](V x) { return M::exp(x); }, [](double x) { return std::exp(x); }, 2,
          [](float x) { return x == x; });
    check("log", [](V x) { return M::log(x); }, [](double x) { return std::log(x); }, 2,
          [](float x) { return x >= M::tiny; });
    check("exp2", [](V x) { return M::exp2(x); }, [](double x) { return std::exp2(x); }, 2,
          [](float x) { return x == x; });
    // Below 3/4 the whole part, -1, takes most of the other away: its error counts for more.
    check("log2", [](V x) { return M::log2(x); }, [](double x) { return std::log2(x); }, 3,
          [](float x) { return x >= M::tiny; });
    check("log1p", [](V x) { return M::log1p(x); }, [](double x) { return std::log1p(x); }, 2,
          [](float x) { return x >= 0 && x <= 1; });
    // The roundings of e^2x - 1, of a sum and of a quotient
    check("tanh", [](V x) { return M::tanh(x); }, [](double x) { return std::tanh(x); }, 3,
          [](float x) { return x == x; });
    check("sqrt", [](V x) { return M::sqrt(x); }, [](double x) { return std::sqrt(x); }, 0.5,
          [](float x) { return x >= 0; });
    // sigmoid and softplus add the rounding of two operations to that of exp
    check("sigmoid", [](V x) { return sigmoid<M>(x); }, [](double x) { return 1 / (1 + std::exp(-x)); }, 4,
          [](float x) { return x > -87; });  // below, e^-x overflows and a denormal answer becomes 0
    check("softplus", [](V x) { return softplus<M>(x); },
          [](double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }, 4,
          [](float x) { return x == x; });

    const float nan = std::nanf("");
    const V poison = V{} + nan;
    const V answers[] = {M::exp(poison),         M::log(poison),      M::log1p(poison),        M::tanh(poison),
                         M::exp2(poison),        M::log2(poison),     M::sqrt(poison),         sigmoid<M>(poison),
                         softplus<M>(poison),    clamp<M>(poison, 20.0f)};
    for (const V& answer : answers)
        for (int i = 0; i < W; ++i) expect(answer[i] != answer[i], "NaN in, NaN out");
    for (const float far : {1000.0f, M::infinity}) {
        expect(M::exp(far) == M::infinity && M::exp(-far) == 0, "exp of what is far out");
        expect(M::exp2(V{} + far)[0] == M::infinity && M::exp2(V{} - far)[0] == 0, "exp2 of what is far out");
    }
    expect(M::log(M::infinity) == M::infinity, "log of infinity");
    expect(M::log2(V{} + M::infinity)[0] == M::infinity, "log2 of infinity");

    // Tiles read and write exactly the n elements they are given.
    Thread<float> team;
    for (Size n = 1; n <= 3 * W + 1; ++n) {
        std::vector<float> in(n), out(n + 2 * W, -1.0f);
        float total = 0, highest = -M::infinity;
        for (Size i = 0; i < n; ++i) {
            in[i] = float((i * 7) % 13) - 20;
            total += in[i], highest = std::max(highest, in[i]);
        }
        V sum{}, top = V{} - M::infinity;
        team.tiles(n, [&](auto tile) {
            const V v = tile.load(in.data());
            sum += tile.only(v, 0.0f);
            const V w = tile.only(v, -M::infinity);
            top = M::select(w > top, w, top);
            tile.store(out.data() + W, v);
        });
        expect(team.sum(sum) == total, "sum over tiles");  // small integers: exact in any order
        expect(team.max(top) == highest, "maximum over tiles, all negative");
        for (Size i = 0; i < n + 2 * W; ++i)
            expect(out[i] == (i < W || i >= n + W ? -1.0f : in[i - W]), "tiles stay inside");
    }
    for (Size rows = 1; rows <= 9; ++rows) {
        const Size n = W + 3;
        std::vector<float> x(rows * n), alone(rows), ones(rows), twos(rows);
        for (Size i = 0; i < rows * n; ++i) x[i] = float(i % 5);
        team.rows<2>(
            rows, n,
            [&](auto block, auto tile, auto& sums) {
                unroll<block.count>([&](auto k) {
                    sums[k][0] += tile.load(x.data() + (block.first + k) * n);
                    sums[k][1] += 2 * tile.load(x.data() + (block.first + k) * n);
                });
            },
            [&](Size row, const float* sum) { ones[row] = sum[0], twos[row] = sum[1]; });
        team.rows<1>(
            rows, n,
            [&](auto block, auto tile, auto& sums) {
                unroll<block.count>([&](auto k) { sums[k][0] += tile.load(x.data() + (block.first + k) * n); });
            },
            [&](Size row, const float* sum) { alone[row] = sum[0]; });
        for (Size row = 0; row < rows; ++row) {
            float want = 0;
            for (Size i = 0; i < n; ++i) want += x[row * n + i];
            expect(alone[row] == want && ones[row] == want && twos[row] == 2 * want, "sums of rows");
        }
    }

    V four[4];
    for (int i = 0; i < 4 * W; ++i) four[i / W][i % W] = 1 / float(i + 3);
    float sums[4];
    sum_four<float, W>(four, sums);
    for (int k = 0; k < 4; ++k)
        expect(sums[k] == fold<float, W>(four[k], [](auto a, auto b) { return a + b; }), "four sums, to the bit");
    return failures;
}
