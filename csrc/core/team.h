// What the mathematics asks of a Team, the threads that work together on one batch element.
//
// Everything in core/ is written once, for any Team: a CPU thread, whose tiles are SIMD vectors, or a CUDA warp, group
// of warps or block. A Team provides:
//
//   Real, V              float or double; W of them, with elementwise arithmetic and comparison
//   Math                 select(mask, a, b), exp, log1p, tanh, sqrt of V and of Real; exp2 and log2 of V; max and min
//                        of two V, which give the second if one is NaN; multiply_add(a, b, c), a b + c of V, where a c
//                        that is itself a product is rounded first; tiny, the smallest normal number, and infinity
//   tiles(n, f)          calls f(tile) for every tile of W contiguous elements of 0..n, shared out over the threads;
//                        tile.load(p) and tile.store(p, v) move p[tile.begin ...], tile.only(v, fill) replaces the
//                        lanes past n
//   rows<S>(m, n, f, done)
//                        S sums over n for every row of 0..m. Calls f(block, tile, sums) for blocks of rows and tiles
//                        of n. For every k of 0..block.count, by unroll, f adds to sums[k][0..S] what the tile gives
//                        to row block.first + k; it uses tile.only if lanes past n might not give 0. Then one thread
//                        calls done(row, totals) for every row. So f can load once what a block's rows share.
//   columns<S>(m, n, f, done)
//                        S sums over m for every element of 0..n. Calls f(i, tile, sums) for every i of 0..m and every
//                        tile, which adds to sums[0..S] what row i gives, then done(tile, sums)
//   one(f)               one thread calls f()
//   each(n, f)           calls f(i) for every i of 0..n, shared out over the threads
//   sum(v), max(v)       over all lanes and threads; every thread gets the result
//   ahead(n, p)          the n numbers at p are wanted soon, to be read or written: a hint, for a cache
//   alone                whether it is a single thread: no other thread works while it waits
//   sync()               a barrier: what a thread stored before it is seen by all threads of the team after it
//   staged               whether arrays that lie far off are copied to scratch while they are worked on. Then in(arena,
//                        p, n) and out(arena, p, n) give places in scratch that stand for the n numbers at p; in()
//                        copies the numbers there, to be seen after a sync(), and put(n, from, p), after a sync(),
//                        copies those of an out() back. Otherwise in() and out() give p, and put() does nothing.
//
// tiles() gives the same elements to the same thread every time, so a sync() is needed only between two passes where
// one reads elements that another thread stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

// NTM_FN        for every function here: inlined.
// NTM_INLINE    for every lambda that runs in a loop over tiles: a call would keep its caller's sums in memory.
// NTM_PASS      for a function that passes over an element's arrays. On a CPU it stays a function of its own: several
//               inlined into one would leave too few registers for the addresses in their inner loops.
// NTM_RESTRICT  for a pointer to the few numbers that a pass uses for every tile: a CPU need not load them again after
//               each of the pass's stores. A GPU has too few registers to keep them, and may load them again.
// NTM_ROLLED    before a loop that must not be unrolled.
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
using Index = std::int32_t;  // within one batch element; on a GPU it is the faster one

// Calls f(0), f(1), ... f(Count - 1) with constants. An array that f indexes with them can stay in registers; one that
// a loop indexes often cannot, because compilers decide that before they unroll loops.
template <int... I, class F>
NTM_FN void unroll(std::integer_sequence<int, I...>, F&& f) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int Count, class F>
NTM_FN void unroll(F&& f) {
    unroll(std::make_integer_sequence<int, Count>{}, f);
}

// Count rows (or other things), from first on. count is a constant even through a value: block.count.
template <int Count>
struct Chunk {
    static constexpr int count = Count;
    Index first;
};

// Calls f(chunk) for chunks of Count, and for what remains at the end chunks of 1, that together make up 0..n.
template <int Count, class F>
NTM_FN void chunks(Index n, F&& f) {
    Index i = 0;
    for (; i + Count <= n; i += Count) f(Chunk<Count>{i});
    for (; i < n; ++i) f(Chunk<1>{i});
}

// Whether an optional pointer was given. If not, its type is std::nullptr_t.
template <class Pointer>
constexpr bool present = !std::is_same_v<Pointer, std::nullptr_t>;

// Hands out pieces of a caller's scratch memory, each aligned to 16 elements. Nothing is given back: a copy of the
// arena, taken before, hands out the same memory again.
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

// The rounded size that pieces of these sizes take in an arena.
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
