// The GPU's Teams: a warp, a group of warps, or a whole block.
//
// A lane's elements of a tile lie a team's size apart. So neighbouring lanes touch neighbouring numbers, whatever the
// alignment, the shift and the bank; with four contiguous numbers to a lane they would not. Copies to and from shared
// memory go by vectors of 16 bytes.
//
// All of it is plain CUDA C++, so that a host's compiler can take it too and tests can run it without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <limits>

#include "core/team.h"
#include "cuda/plan.h"

// The block's shared memory; launch.h and sequence.cu deal it out.
extern __shared__ __align__(16) unsigned char ntm_shared[];

namespace ntm::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

template <int W>
struct Mask {
    bool lane[W];
};

// W numbers, with elementwise arithmetic and comparison; a single number stands for W equal ones.
template <class T, int W>
struct Vector {
    T lane[W] = {};

    NTM_FN T& operator[](int i) { return lane[i]; }
    NTM_FN T operator[](int i) const { return lane[i]; }

    NTM_FN friend Vector operator-(Vector a) {
        return map(a, [](T x) NTM_INLINE { return -x; });
    }
    NTM_FN friend Vector operator+(Vector a, Vector b) {
        return map(a, b, [](T x, T y) NTM_INLINE { return x + y; });
    }
    NTM_FN friend Vector operator-(Vector a, Vector b) {
        return map(a, b, [](T x, T y) NTM_INLINE { return x - y; });
    }
    NTM_FN friend Vector operator*(Vector a, Vector b) {
        return map(a, b, [](T x, T y) NTM_INLINE { return x * y; });
    }
    NTM_FN friend Vector operator/(Vector a, Vector b) {
        return map(a, b, [](T x, T y) NTM_INLINE { return x / y; });
    }
    NTM_FN friend Vector operator+(Vector a, T b) { return a + all(b); }
    NTM_FN friend Vector operator-(Vector a, T b) { return a - all(b); }
    NTM_FN friend Vector operator*(Vector a, T b) { return a * all(b); }
    NTM_FN friend Vector operator/(Vector a, T b) { return a / all(b); }
    NTM_FN friend Vector operator+(T a, Vector b) { return all(a) + b; }
    NTM_FN friend Vector operator-(T a, Vector b) { return all(a) - b; }
    NTM_FN friend Vector operator*(T a, Vector b) { return all(a) * b; }
    NTM_FN friend Vector operator/(T a, Vector b) { return all(a) / b; }
    NTM_FN Vector& operator+=(Vector b) { return *this = *this + b; }
    NTM_FN Vector& operator-=(Vector b) { return *this = *this - b; }
    NTM_FN Vector& operator*=(Vector b) { return *this = *this * b; }

    NTM_FN friend Mask<W> operator<(Vector a, Vector b) {
        Mask<W> mask;
        unroll<W>([&](auto i) NTM_INLINE { mask.lane[i] = a[i] < b[i]; });
        return mask;
    }
    NTM_FN friend Mask<W> operator<(Vector a, T b) { return a < all(b); }
    NTM_FN friend Mask<W> operator>(Vector a, Vector b) { return b < a; }
    NTM_FN friend Mask<W> operator>(Vector a, T b) { return all(b) < a; }

    NTM_FN static Vector all(T x) {
        Vector v;
        unroll<W>([&](auto i) NTM_INLINE { v[i] = x; });
        return v;
    }
    template <class F>
    NTM_FN static Vector map(Vector a, F f) {
        unroll<W>([&](auto i) NTM_INLINE { a[i] = f(a[i]); });
        return a;
    }
    template <class F>
    NTM_FN static Vector map(Vector a, Vector b, F f) {
        unroll<W>([&](auto i) NTM_INLINE { a[i] = f(a[i], b[i]); });
        return a;
    }
    template <class F>
    NTM_FN T fold(F f) const {
        T result = lane[0];
        unroll<W - 1>([&](auto i) NTM_INLINE { result = f(result, lane[i + 1]); });
        return result;
    }
    NTM_FN T sum() const {
        return fold([](T a, T b) NTM_INLINE { return a + b; });
    }
};

// The accurate functions, not the fast approximations, which would lose NaN and denormals.
template <class T>
struct Math {
    static constexpr T tiny = std::numeric_limits<T>::min();
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    NTM_FN static T select(bool mask, T a, T b) { return mask ? a : b; }
    NTM_FN static float exp(float x) { return ::expf(x); }
    NTM_FN static float exp2(float x) { return ::exp2f(x); }
    NTM_FN static float log2(float x) { return ::log2f(x); }
    NTM_FN static float log1p(float x) { return ::log1pf(x); }
    NTM_FN static float tanh(float x) { return ::tanhf(x); }
    NTM_FN static float sqrt(float x) { return ::sqrtf(x); }
    NTM_FN static double exp(double x) { return ::exp(x); }
    NTM_FN static double exp2(double x) { return ::exp2(x); }
    NTM_FN static double log2(double x) { return ::log2(x); }
    NTM_FN static double log1p(double x) { return ::log1p(x); }
    NTM_FN static double tanh(double x) { return ::tanh(x); }
    NTM_FN static double sqrt(double x) { return ::sqrt(x); }

    template <int W>
    NTM_FN static Vector<T, W> select(Mask<W> mask, Vector<T, W> a, Vector<T, W> b) {
        unroll<W>([&](auto i) NTM_INLINE { a[i] = mask.lane[i] ? a[i] : b[i]; });
        return a;
    }
    template <int W>
    NTM_FN static Vector<T, W> max(Vector<T, W> a, Vector<T, W> b) {
        return a.map(a, b, [](T x, T y) NTM_INLINE { return x > y ? x : y; });
    }
    template <int W>
    NTM_FN static Vector<T, W> min(Vector<T, W> a, Vector<T, W> b) {
        return a.map(a, b, [](T x, T y) NTM_INLINE { return x < y ? x : y; });
    }
    template <int W>
    NTM_FN static Vector<T, W> multiply_add(Vector<T, W> a, Vector<T, W> b, Vector<T, W> c) {
        return a * b + c;
    }
    template <int W>
    NTM_FN static Vector<T, W> exp(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return exp(x); });
    }
    template <int W>
    NTM_FN static Vector<T, W> exp2(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return exp2(x); });
    }
    template <int W>
    NTM_FN static Vector<T, W> log2(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return log2(x); });
    }
    template <int W>
    NTM_FN static Vector<T, W> log1p(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return log1p(x); });
    }
    template <int W>
    NTM_FN static Vector<T, W> tanh(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return tanh(x); });
    }
    template <int W>
    NTM_FN static Vector<T, W> sqrt(Vector<T, W> v) {
        return v.map(v, [](T x) NTM_INLINE { return sqrt(x); });
    }
};

// A lane's share of W * stride elements. Those from n on do not exist, and load as 0.
template <class T, int W>
struct Tile {
    using V = Vector<T, W>;
    Index begin, n;
    int stride;

    NTM_FN V load(const T* p) const {
        V v;
        unroll<W>([&](auto i) NTM_INLINE {
            if (begin + i * stride < n) v[i] = p[begin + i * stride];
        });
        return v;
    }
    NTM_FN void store(T* p, V v) const {
        unroll<W>([&](auto i) NTM_INLINE {
            if (begin + i * stride < n) p[begin + i * stride] = v[i];
        });
    }
    NTM_FN V only(V v, T fill) const {
        unroll<W>([&](auto i) NTM_INLINE {
            if (begin + i * stride >= n) v[i] = fill;
        });
        return v;
    }
};

// A row's sum as one lane holds it: a single number, to which a tile's W are added at once.
template <class T>
struct Sum {
    T value = 0;

    template <int W>
    NTM_FN void operator+=(Vector<T, W> v) {
        value += v.sum();
    }
};

template <class T, class F>
NTM_FN T over_warp(T x, F f) {
    unroll<5>([&](auto level) NTM_INLINE { x = f(x, __shfl_xor_sync(all_lanes, x, 1 << level)); });
    return x;
}

// Sums over the lanes whose numbers differ in bits Bit down to Last: S sums for each of Count rows. One of these lanes
// then calls then(row, sums) for a row. Every exchange halves the number of rows that a lane still holds, which takes
// 6 shuffles for 4 rows over a warp; one row after the other would take 20.
template <int Bit, int Last, int Count, int S, class T, class F>
NTM_FN void sum_rows(const T (&x)[Count][S], int row, F&& then) {
    const bool upper = threadIdx.x & Bit;
    if constexpr (Bit < Last) {
        if (row >= 0) unroll<Count>([&](auto k) NTM_INLINE { then(row + k, x[k]); });
    } else if constexpr (Count == 1) {
        T sums[1][S];
        unroll<S>([&](auto s) NTM_INLINE { sums[0][s] = x[0][s] + __shfl_xor_sync(all_lanes, x[0][s], Bit); });
        sum_rows<Bit / 2, Last>(sums, upper ? -1 : row, then);
    } else {
        T half[Count / 2][S];
        unroll<Count / 2>([&](auto k) NTM_INLINE {
            unroll<S>([&](auto s) NTM_INLINE {
                const T low = x[k][s], high = x[k + Count / 2][s];
                half[k][s] = (upper ? high : low) + __shfl_xor_sync(all_lanes, upper ? low : high, Bit);
            });
        });
        sum_rows<Bit / 2, Last>(half, row < 0 ? row : row + upper * (Count / 2), then);
    }
}

struct __attribute__((may_alias)) __align__(16) Bytes16 {
    unsigned word[4];
};

// What all teams share: Self provides rank(), size() and sync().
template <class Self, class T, int W>
struct Team {
    using Real = T;
    using V = Vector<T, W>;
    using Math = cuda::Math<T>;
    static constexpr bool alone = false;

    template <class F>
    NTM_FN void tiles(Index n, F&& f) const {
        NTM_ROLLED  // it seldom takes more than one turn, so unrolling would only cost registers and code
        for (Index i = self().rank(); i < n; i += W * self().size()) f(Tile<T, W>{i, n, self().size()});
    }
    // Even and odd rows have a sum each: a single sum would have to wait for its last addition at every row.
    template <int S, class F, class G>
    NTM_FN void columns(Index m, Index n, F&& f, G&& done) const {
        tiles(n, [&](auto tile) NTM_INLINE {
            V sums[2][S];
            chunks<2>(m, [&](auto block) NTM_INLINE {
                unroll<block.count>([&](auto k) NTM_INLINE { f(block.first + k, tile, sums[k]); });
            });
            unroll<S>([&](auto s) NTM_INLINE { sums[0][s] += sums[1][s]; });
            done(tile, sums[0]);
        });
    }
    template <class F>
    NTM_FN void each(Index n, F&& f) const {
        NTM_ROLLED
        for (Index i = self().rank(); i < n; i += self().size()) f(i);
    }
    template <class F>
    NTM_FN void one(F&& f) const {
        if (self().rank() == 0) f();
    }

    NTM_FN static void ahead(Size, const T*) {}  // other warps have work while one waits

    NTM_FN const T* in(Arena<T>& arena, const T* p, Index n) const {
        if constexpr (!Self::staged) return p;
        T* place = arena.take(n);
        put(n, p, place);
        return place;
    }
    NTM_FN T* out(Arena<T>& arena, T* p, Index n) const {
        if constexpr (!Self::staged) return p;
        return arena.take(n);
    }
    NTM_FN void put(Index n, const T* from, T* to) const {
        if constexpr (!Self::staged) return;
        constexpr int numbers = sizeof(Bytes16) / sizeof(T);
        Index vectors = static_cast<unsigned>(n) / numbers;
        if (reinterpret_cast<std::uintptr_t>(from) % 16 || reinterpret_cast<std::uintptr_t>(to) % 16) vectors = 0;
        const Bytes16* source = reinterpret_cast<const Bytes16*>(from);
        Bytes16* target = reinterpret_cast<Bytes16*>(to);
        // All loads stand before the first store: the compiler could not move them there, because the store may alias.
        chunks_apart<vectors_at_once>(vectors, [&](auto chunk) NTM_INLINE {
            Bytes16 bytes[chunk.count];
            unroll<chunk.count>([&](auto k) NTM_INLINE { bytes[k] = source[chunk.first + k * self().size()]; });
            unroll<chunk.count>([&](auto k) NTM_INLINE { target[chunk.first + k * self().size()] = bytes[k]; });
        });
        each(n - vectors * numbers, [&](Index i) NTM_INLINE {
            to[vectors * numbers + i] = from[vectors * numbers + i];
        });
    }

protected:
    // f adds a tile's share to the sums of a chunk of rows; then(row, totals) is called by one lane of every warp for
    // every row, with that warp's sums.
    template <int S, class F, class G>
    NTM_FN void rows_by_warp(Index first, Index end, Index n, F&& f, G&& then) const {
        chunks<rows_at_once>(end - first, [&](auto part) NTM_INLINE {
            const Chunk<part.count> rows{first + part.first};
            Sum<T> sums[part.count][S];
            tiles(n, [&](auto tile) NTM_INLINE { f(rows, tile, sums); });
            T own[part.count][S];
            unroll<part.count>([&](auto k) NTM_INLINE {
                unroll<S>([&](auto s) NTM_INLINE { own[k][s] = sums[k][s].value; });
            });
            sum_rows<warp_size / 2, 1>(own, rows.first, then);
        });
    }

private:
    NTM_FN const Self& self() const { return static_cast<const Self&>(*this); }

    // As chunks(), but the elements of a chunk are a team's size apart.
    template <int Count, class F>
    NTM_FN void chunks_apart(Index n, F&& f) const {
        Index i = self().rank();
        NTM_ROLLED
        for (; i + (Count - 1) * self().size() < n; i += Count * self().size()) f(Chunk<Count>{i});
        NTM_ROLLED
        for (; i < n; i += self().size()) f(Chunk<1>{i});
    }
};

// One warp; the block has several.
template <class T>
struct Warp : Team<Warp<T>, T, warp_numbers> {
    static constexpr bool staged = true;
    static constexpr int max_threads = warps_per_block * warp_size, min_blocks = warp_blocks;  // launch bounds
    static constexpr Size reserved = 0;  // numbers of shared memory beside the scratch

    NTM_FN explicit Warp(T*) {}
    NTM_FN int rank() const { return threadIdx.x % warp_size; }
    NTM_FN static constexpr int size() { return warp_size; }
    NTM_FN void sync() const { __syncwarp(); }

    NTM_FN T sum(typename Warp::V v) const {
        return over_warp(v.sum(), [](T a, T b) NTM_INLINE { return a + b; });
    }
    NTM_FN T max(typename Warp::V v) const {
        auto larger = [](T a, T b) NTM_INLINE { return a > b ? a : b; };
        return over_warp(v.fold(larger), larger);
    }
    template <int S, class F, class G>
    NTM_FN void rows(Index m, Index n, F&& f, G&& done) const {
        this->template rows_by_warp<S>(0, m, n, f, done);
    }
};

// Several warps. They exchange sums through shared memory, in two halves that take turns: between two writes to the
// same half there is always a barrier, so that all have read what was there.
template <class Self, class T>
struct Warps : Team<Self, T, 1> {
    NTM_FN T sum(typename Warps::V v) const {
        return over_all(v[0], [](T a, T b) NTM_INLINE { return a + b; });
    }
    NTM_FN T max(typename Warps::V v) const {
        return over_all(v[0], [](T a, T b) NTM_INLINE { return a > b ? a : b; });
    }
    template <int S, class F, class G>
    NTM_FN void rows(Index m, Index n, F&& f, G&& done) const {
        const int warps = self().size() / warp_size, warp = self().rank() / warp_size;
        const Index most = self().half() / (S * warps);  // rows that fit: 16 or more
        for (Index first = 0; first < m; first += most) {
            const Index end = first + most < m ? first + most : m;
            T* place = next_half();
            this->template rows_by_warp<S>(first, end, n, f, [&](Index row, const T* totals) NTM_INLINE {
                unroll<S>([&](auto s) NTM_INLINE { place[((row - first) * S + s) * warps + warp] = totals[s]; });
            });
            self().sync();
            this->each(end - first, [&](Index row) NTM_INLINE {
                T totals[S];
                unroll<S>([&](auto s) NTM_INLINE {
                    totals[s] = 0;
                    for (int w = 0; w < warps; ++w) totals[s] += place[(row * S + s) * warps + w];
                });
                done(first + row, totals);
            });
        }
    }

protected:
    NTM_FN explicit Warps(T* exchange) : exchange(exchange) {}

private:
    T* exchange;
    mutable int turn = 0;

    NTM_FN const Self& self() const { return static_cast<const Self&>(*this); }
    NTM_FN T* next_half() const {
        turn ^= 1;
        return exchange + turn * self().half();
    }
    template <class F>
    NTM_FN T over_all(T x, F f) const {
        x = over_warp(x, f);
        T* place = next_half();
        if (self().rank() % warp_size == 0) place[self().rank() / warp_size] = x;
        self().sync();
        x = place[0];
        for (int w = 1; w < self().size() / warp_size; ++w) x = f(x, place[w]);
        return x;
    }
};

// A whole block.
template <class T, bool Staged>
struct Block : Warps<Block<T, Staged>, T> {
    static constexpr bool staged = Staged;
    static constexpr int max_threads = most_threads, min_blocks = 1;
    static constexpr Size reserved = block_exchange;

    NTM_FN explicit Block(T* exchange) : Warps<Block, T>(exchange) {}
    NTM_FN int rank() const { return threadIdx.x; }
    NTM_FN int size() const { return blockDim.x; }
    NTM_FN static constexpr Index half() { return reserved / 2; }
    NTM_FN void sync() const { __syncthreads(); }
};

// Some warps of a block, 2^n threads; the block's other warps form other such groups, with work of their own.
template <class T>
struct Group : Warps<Group<T>, T> {
    static constexpr bool staged = true;
    const int threads, index;

    NTM_FN Group(T* exchange, int threads, int index)
        : Warps<Group, T>(exchange), threads(threads), index(index) {}
    NTM_FN int rank() const { return threadIdx.x & (threads - 1); }
    NTM_FN int size() const { return threads; }
    NTM_FN Index half() const { return threads; }  // a number for every thread
    NTM_FN void sync() const { __barrier_sync_count(1 + index, threads); }  // barrier 0 is the block's
};

}  // namespace ntm::cuda
