// Memory of one call, and sharing work out to OpenVINO's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "openvino/core/parallel.hpp"

namespace edge {

inline std::size_t ceil_div(std::size_t size, std::size_t step) { return (size + step - 1) / step; }

// Memory that is taken for one call and given back. Fresh pages in every call would cost as much as a small layer;
// memory of a thread would break where a thread that waits runs another stream's op in between.
class Scratch {
public:
    explicit Scratch(std::size_t floats) {
        {
            const std::lock_guard<std::mutex> lock(mutex());
            if (!pool().empty()) {
                m_memory = std::move(pool().back());
                pool().pop_back();
            }
        }
        if (m_memory.size() < floats + 16) {
            m_memory.resize(floats + 16);
        }
        void* begin = m_memory.data();
        std::size_t space = m_memory.size() * sizeof(float);
        m_next = static_cast<float*>(std::align(64, floats * sizeof(float), begin, space));
    }

    ~Scratch() {
        const std::lock_guard<std::mutex> lock(mutex());
        pool().push_back(std::move(m_memory));
    }

    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // A part of the memory, for `count` values of T.
    template <class T>
    T* take(std::size_t count) {
        T* part = reinterpret_cast<T*>(m_next);
        m_next += floats_of<T>(count);
        return part;
    }

    template <class T>
    static std::size_t floats_of(std::size_t count) {
        return ceil_div(count * sizeof(T), 64) * 16;
    }

private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static std::vector<std::vector<float>>& pool() {
        static std::vector<std::vector<float>> instance;
        return instance;
    }

    std::vector<float> m_memory;
    float* m_next;
};

// Runs work(task, thread) for all tasks: the next task goes to the thread that is free.
template <class Work>
void share_out(std::size_t tasks, std::size_t threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    ov::parallel_nt(static_cast<int>(std::min(tasks, threads)), [&](int thread, int) {
        for (std::size_t task = next++; task < tasks; task = next++) {
            work(task, static_cast<std::size_t>(thread));
        }
    });
}

inline std::size_t num_threads() { return static_cast<std::size_t>(std::max(1, parallel_get_max_threads())); }

}  // namespace edge
