// Cosine content addressing: c_i = k.M_i / (A B_i), A = sqrt(|k|^2 + eps^2), B_i = sqrt(|M_i|^2 + eps^2), and
// wc = softmax(beta c).
#pragma once

#include "core/softmax.h"

namespace ntm {

// A, the key's norm
template <class Team, class T = typename Team::Real>
NTM_PASS T key_norm(const Team& team, Index M, T eps, const T* key /*[M]*/) {
    typename Team::V squares{};
    team.tiles(M, [&](auto tile) NTM_INLINE {
        const auto k = tile.load(key);
        squares += k * k;
    });
    return Team::Math::sqrt(team.sum(squares) + eps * eps);
}

// 1/B_i. The head that addresses a memory leaves them for the next head or step that addresses the same memory.
template <class T>
struct Norms {
    T* inverse;  // [N]
    bool known;  // whether inverse holds this memory's
};

// Calls cosines(known), where known says whether the memory's norms are; if not, cosines computes them. Without norms
// known is always false.
template <class Given, class F>
NTM_FN void with_norms(Given norms /*Norms<T>* or nullptr*/, F&& cosines) {
    if constexpr (present<Given>)
        if (norms->known) return cosines(std::true_type{});
    cosines(std::false_type{});
    if constexpr (present<Given>) norms->known = true;
}

// Stores the cosines and, unless they are Known, 1/B_i. row(m, tile) gives the tile of row m of the memory. For a head
// that also reads, grad_reads is dr, and M_i.dr is added to grad_weights. All of it in one pass: the memory comes from
// cache once.
template <bool Known, class Team, class Row, class Reads, class T = typename Team::Real>
NTM_FN void cosine_of_rows(const Team& team, Index N, Index M, T eps, T key_norm, Row&& row, const T* key /*[M]*/,
                           T* cosine /*[N]*/, T* inverse_norm /*[N]*/, Reads grad_reads /*[M] or nullptr*/,
                           T* grad_weights /*[N], added*/) {
    using V = typename Team::V;
    constexpr bool reads = present<Reads>;
    const T inverse_key_norm = 1 / key_norm;
    team.template columns<1 + reads + !Known>(
        M, N,
        [&](Index m, auto tile, auto& sums) NTM_INLINE {
            const V x = row(m, tile);
            sums[0] += key[m] * x;
            if constexpr (reads) sums[1] += grad_reads[m] * x;
            if constexpr (!Known) sums[1 + reads] += x * x;
        },
        [&](auto tile, const auto& sums) NTM_INLINE {
            V inverse;
            if constexpr (Known)
                inverse = tile.load(inverse_norm);
            else
                tile.store(inverse_norm, inverse = 1 / Team::Math::sqrt(sums[1 + reads] + eps * eps));
            tile.store(cosine, sums[0] * inverse * inverse_key_norm);
            if constexpr (reads) tile.store(grad_weights, tile.load(grad_weights) + sums[1]);
        });
}

template <bool Known = false, class Team, class Reads = std::nullptr_t, class T = typename Team::Real>
NTM_PASS void cosine(const Team& team, Index N, Index M, T eps, T key_norm, const T* memory /*[M, N]*/,
                     const T* key /*[M]*/, T* cosine /*[N]*/, T* inverse_norm /*[N]*/, Reads grad_reads = nullptr,
                     T* grad_weights = nullptr) {
    auto row = [&](Index m, auto tile) NTM_INLINE { return tile.load(memory + m * N); };
    cosine_of_rows<Known>(team, N, M, eps, key_norm, row, key, cosine, inverse_norm, grad_reads, grad_weights);
}

// wc = softmax(beta c). No cosine is beyond 1, so no exponent is beyond beta.
template <class Team, class T = typename Team::Real>
NTM_PASS void content_weights(const Team& team, Index N, T beta, const T* cosine, T* content) {
    const T scale = T(log2_e) * beta;
    softmax(team, N, [&](auto tile) NTM_INLINE { return scale * tile.load(cosine); }, scale < 0 ? -scale : scale,
            content);
}

// From dwc to dk, dbeta and dM. dwc is overwritten with dc/(A B), and cosine with dc c / B^2. grad_memory becomes
// grad_after plus the gradient that comes through here; grad_after may be grad_memory itself, or nullptr for 0. For a
// head that also reads, grad_reads is dr and weights are w: then w_i dr is added too.
template <class Team, class After, class Reads = std::nullptr_t, class T = typename Team::Real>
NTM_PASS void content_backward(const Team& team, Index N, Index M, T key_norm, const T* memory /*[M, N]*/,
                               const T* NTM_RESTRICT key /*[M]*/, T beta, const T* content /*[N]*/,
                               T* cosine /*[N]*/, const T* inverse_norm /*[N]*/, T* grad_content /*[N]*/,
                               After grad_after /*[M, N] or nullptr*/, T* grad_memory /*[M, N]*/, T* grad_key /*[M]*/,
                               T* grad_beta /*[1]*/, Reads grad_reads = nullptr /*[M] or nullptr*/,
                               const T* weights = nullptr /*[N]*/) {
    using V = typename Team::V;
    const T inverse_key_norm = 1 / key_norm;
    const T mean = dot(team, N, content, grad_content);
    V along_beta{};
    team.tiles(N, [&](auto tile) NTM_INLINE {
        const V c = tile.load(cosine), inverse = tile.load(inverse_norm);
        const V dz = tile.load(content) * (tile.load(grad_content) - mean);
        along_beta += tile.only(dz * c, T(0));
        const V dc = beta * dz;
        tile.store(grad_content, dc * inverse * inverse_key_norm);
        tile.store(cosine, dc * c * inverse * inverse);
    });
    const T sum_dz_c = team.sum(along_beta);
    const T pull = beta * sum_dz_c * inverse_key_norm * inverse_key_norm;  // sum_i dc_i c_i / A^2
    team.template rows<1>(
        M, N,
        [&](auto block, auto tile, auto& sums) NTM_INLINE {
            const V p = tile.load(grad_content), q = tile.load(cosine);
            V x[block.count], dM[block.count] = {};
            [[maybe_unused]] V w{};
            if constexpr (present<Reads>) w = tile.load(weights);
            unroll<block.count>([&](auto k) NTM_INLINE {  // all loads before the first store, which may alias
                x[k] = tile.load(memory + (block.first + k) * N);
                if constexpr (present<After>) dM[k] = tile.load(grad_after + (block.first + k) * N);
            });
            unroll<block.count>([&](auto k) NTM_INLINE {
                const Index m = block.first + k;
                dM[k] += p * key[m] - q * x[k];
                if constexpr (present<Reads>) dM[k] += w * grad_reads[m];
                tile.store(grad_memory + m * N, dM[k]);
                sums[k][0] += p * x[k];
            });
        },
        [&](Index m, const T* sum) NTM_INLINE { grad_key[m] = sum[0] - pull * key[m]; });
    team.one([&]() NTM_INLINE { *grad_beta = sum_dz_c; });
}

}  // namespace ntm
