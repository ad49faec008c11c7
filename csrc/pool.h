// Memory for what a training step leaves to its backward, kept from one step to the next. A fresh block of some
// megabytes costs a page fault every 4 KB, because the C library gives it back to the system as soon as it is free: a
// quarter of a training step at a batch of 256.
#pragma once

#include <cstddef>
#include <list>
#include <mutex>
#include <new>

namespace ntm {

class Pool {
public:
    explicit Pool(std::size_t most) : most(most) {}
    ~Pool() { release(); }

    // At least so many bytes, uninitialised, aligned to a cache line; nullptr where there is no memory. size becomes
    // what give() is to be told.
    void* take(std::size_t& size) {
        size = (size + page - 1) / page * page;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            // The smallest block that is large enough, unless it is much too large; among equal ones the last given.
            auto best = kept.end();
            for (auto block = kept.begin(); block != kept.end(); ++block)
                if (block->size >= size && block->size <= size + size / 4 &&
                    (best == kept.end() || block->size < best->size))
                    best = block;
            if (best != kept.end()) {
                void* memory = best->memory;
                size = best->size;
                in_pool -= size;
                kept.erase(best);
                return memory;
            }
        }
        return ::operator new(size, alignment, std::nothrow);
    }

    // Keeps the block, and frees the oldest ones if they are more than `most` bytes together.
    void give(void* memory, std::size_t size) {
        const std::lock_guard<std::mutex> lock(mutex);
        kept.push_front({memory, size});
        in_pool += size;
        while (in_pool > most) drop();
    }

    // Frees all that is kept, and tells how many bytes that was.
    std::size_t release() {
        const std::lock_guard<std::mutex> lock(mutex);
        const std::size_t released = in_pool;
        while (!kept.empty()) drop();
        return released;
    }

private:
    struct Block {
        void* memory;
        std::size_t size;
    };
    static constexpr std::size_t page = 4096;
    static constexpr std::align_val_t alignment{64};

    void drop() {
        ::operator delete(kept.back().memory, alignment);
        in_pool -= kept.back().size;
        kept.pop_back();
    }

    const std::size_t most;
    std::mutex mutex;
    std::list<Block> kept;  // the last given first
    std::size_t in_pool = 0;
};

}  // namespace ntm
