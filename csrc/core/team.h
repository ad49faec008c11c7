// What the mathematics asks of a group of threads that works on one batch element.
//
// Everything in core/ is written once, for any Team: one CPU thread whose tiles are SIMD vectors, or a CUDA warp or
// block. A Team provides:
//
//   Real, V              float or double; W of them, with elementwise arithmetic and comparison
//   Math                 select(mask, a, b), exp, log1p, tanh, sqrt of V and of Real; exp2 and log2 of V; max and min
//                        of two V, the second where one is NaN; multiply_add(a, b, c), a b + c of V, where c is rounded
//                        first if it is a product; tiny, the smallest normal number, and infinity
//   tiles(n, f)          calls f(tile) for every tile of W contiguous elements of 0..n, shared out over the threads;
//                        tile.load(p) and tile.store(p, v) move p[tile.begin ...], tile.only(v, fill) replaces the
//                        lanes past n
//   rows<S>(m, n, f, done)
//                        S sums over n for every row of 0..m: calls f(block, tile, sums) for blocks of rows and tiles
//                        of n; for every k of 0..block.count, by unroll, it adds to sums[k][0..S] what the tile
//                        contributes to row block.first + k, through tile.only where lanes past n might count. Then
//                        one thread calls done(row, totals) for every row. What a block's rows share is loaded once.
//   columns<S>(m, n, f, done)
//                        S sums over m for every element of 0..n: calls f(i, tile, sums) for every i of 0..m and every
//                        tile, to add to sums[0..S] what row i contributes, then done(tile, sums)
//   one(f)               one thread calls f()
//   each(n, f)           calls f(i) for every i of 0..n, shared out over the threads
//   sum(v), max(v)       over all lanes and threads; every thread gets the result
//   ahead(n, p)          the n numbers at p are wanted soon, to be read or written: a hint, for a cache
//   alone                whether it is one thread, which finds nothing else to do while it waits
//   sync()               what the threads stored before is seen by all of them after
//   staged               whether what lies far off is copied to scratch for the time of the work. in(arena, p, n) and
//                        out(arena, p, n) are then places in scratch for the n numbers at p, else p itself; in()
//                        fills it, to be seen after a sync(), and put(n, from, p) takes an out() to where it belongs,
//                        after one.
//
// tiles() hands the same elements to the same thread every time, so that only what crosses tiles needs a sync().
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

// NTM_FN on every function here, and NTM_INLINE on every lambda that runs in a loop over tiles: one that is left as a
// call would keep its caller's sums in memory. But NTM_PASS on what passes over an element's arrays: for a CPU these
// stay functions, because all of them in one leave no registers for the addresses of its inner loops. NTM_RESTRICT on
// the few numbers that such a pass uses for every tile: for all that a compiler knows its stores might change them, and
// they would be loaded again each time. On a GPU, where registers are short, they may be.
#ifdef __CUDACC__
#define NTM_FN __device__ __forceinline__
#define NTM_PASS __device__ __forceinline__
#define NTM_INLINE
#define NTM_RESTRICT
#define NTM_ROLLED _Pragma("unroll 1")
#else
#define NTM_FN inline __attribute__((always_inline))
#define NTM_PASS __attribute__((noinline))
#define NTM_INLINE __attribute__((always_inline))
#define NTM_RESTRICT __restrict__
#define NTM_ROLLED _Pragma("GCC unroll 1")
#endif

namespace ntm {

using Size = std::int64_t;
using Index = std::int32_t;  // within one batch element: GPUs count faster with it

// Calls f(0), f(1), ... f(Count - 1) with constants, so that what f indexes with them can stay in registers: compilers
// decide what may before they unroll loops.
template <int... I, class F>
NTM_FN void unroll(std::integer_sequence<int, I...>, F&& f) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int Count, class F>
NTM_FN void unroll(F&& f) {
    unroll(std::make_integer_sequence<int, Count>{}, f);
}

// Count rows or whatever else, from first on; count can be reached through a value: block.count
template <int Count>
struct Chunk {
    static constexpr int count = Count;
    Index first;
};

// Calls f(chunk) for chunks of Count, and at the end of 1, that make up 0..n.
template <int Count, class F>
NTM_FN void chunks(Index n, F&& f) {
    Index i = 0;
    for (; i + Count <= n; i += Count) f(Chunk<Count>{i});
    for (; i < n; ++i) f(Chunk<1>{i});
}

// Whether a pointer that may be given was: std::nullptr_t where not
template <class Pointer>
constexpr bool present = !std::is_same_v<Pointer, std::nullptr_t>;

// Hands out pieces of a caller's scratch memory, each aligned to 16 elements.
template <class T>
struct Arena {
    T* next;

    static constexpr Size size(Size count) { return (count + 15) & ~Size(15); }

    NTM_FN T* take(Size count) {
        T* piece = next;
        next += size(count);
        return piece;
    }
};

// The room that pieces of these sizes take in an arena.
template <class... Sizes>
constexpr Size room(Sizes... sizes) {
    return (0 + ... + Arena<char>::size(sizes));
}

// x = 0
template <class Team, class T = typename Team::Real>
NTM_FN void clear(const Team& team, Index count, T* x) {
    team.tiles(count, [&](auto tile) NTM_INLINE { tile.store(x, typename Team::V{}); });
}

// to = from; they may be the same
template <class Team, class T = typename Team::Real>
NTM_FN void copy(const Team& team, Index count, const T* from, T* to) {
    team.tiles(count, [&](auto tile) NTM_INLINE { tile.store(to, tile.load(from)); });
}

}  // namespace ntm
