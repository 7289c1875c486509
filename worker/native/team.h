// Owns the threads that share a call's work. They wait between calls: spinning for a while, since a step's next call comes soon,
// then asleep, so that an idle server uses no processor and a busy neighbour gets the core.

#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // some ten nanoseconds; `yield` does nothing on most
#endif
}

class Pool {
public:
    static constexpr int FEWEST_SPINS = 250, MOST_SPINS = 4000;

    explicit Pool(int count) : count(count) {}

    // Until `turn` turns have been called, and one more. Who has spun in vain spins less the next time: where there are fewer
    // cores than threads, whoever is waited for needs this one.
    void wait(uint64_t turn) {
        static thread_local int spins = MOST_SPINS;
        for (int spin = 0; spin < spins; spin++) {
            if (turns.load(std::memory_order_acquire) != turn) {
                spins = spins + spins / 4 < MOST_SPINS ? spins + spins / 4 : MOST_SPINS;
                return;
            }
            relax();
        }
        spins = spins / 2 > FEWEST_SPINS ? spins / 2 : FEWEST_SPINS;
        std::unique_lock<std::mutex> lock(mutex);
        sleepers++;
        awake.wait(lock, [&] { return turns.load() != turn; });
        sleepers--;
    }

    void call() {
        turns++;
        if (!sleepers.load()) return;
        { std::lock_guard<std::mutex> lock(mutex); }
        awake.notify_all();
    }

    const int count;
    std::atomic<uint64_t> turns{0};
    std::atomic<int> arrived{0}, sleepers{0};
    std::atomic<int64_t> next[2] = {{0}, {0}};
    uint64_t (*job)(void* body, Pool& pool, uint64_t turn) = nullptr;  // gives the turn it ended with
    void* body = nullptr;
    std::mutex mutex;
    std::condition_variable awake;
};

// A thread's part in a call that all threads make.
class Team {
public:
    Team(Pool* pool, uint64_t turn) : pool(pool), turn(turn) {}

    int64_t count() const { return pool ? pool->count : 1; }

    // work(first, last) for parts of `count` items, `grain` items at least, by whoever is free; all wait for the last.
    template <typename Work>
    void share(int64_t count, int64_t grain, const Work& work) {
        if (!pool) return work((int64_t)0, count);
        // Parts are so small that the others wait only briefly for a thread whose core another process has taken.
        const int64_t even = (count + 4 * pool->count - 1) / (4 * pool->count), part = (even + grain - 1) / grain * grain;
        std::atomic<int64_t>& next = pool->next[turn % 2];
        for (int64_t first; (first = next.fetch_add(part, std::memory_order_relaxed)) < count;)
            work(first, first + part < count ? first + part : count);
        meet();
    }

    void meet() {
        if (!pool) return;
        if (pool->arrived.fetch_add(1) + 1 == pool->count) {
            pool->arrived.store(0);
            pool->next[(turn + 1) % 2].store(0);  // no thread has used it since the turn before this one
            pool->call();
        } else {
            pool->wait(turn);
        }
        turn++;
    }

    // Waits for all; after that nothing of the call may be touched.
    uint64_t leave() {
        meet();
        return turn;
    }

private:
    Pool* pool;
    uint64_t turn;
};

Pool* pool = nullptr;  // null: the calling thread alone

// From now on calls are shared by `count` threads, the caller's included. Those of an earlier pool sleep on.
void set_threads(int count) {
    if (count == (pool ? pool->count : 1)) return;
    pool = nullptr;
    if (count < 2) return;
    Pool* made = new Pool(count);  // never freed: its threads wait in it to the end
    for (int i = 1; i < count; i++)
        std::thread([made] {
            for (uint64_t turn = 0;;) {
                made->wait(turn);
                turn = made->job(made->body, *made, turn + 1);
            }
        }).detach();
    pool = made;
}

// body(team) on every thread at once.
template <typename Body>
void together(const Body& body) {
    if (!pool) {
        Team alone(nullptr, 0);
        body(alone);
        return;
    }
    pool->body = (void*)&body;
    pool->job = [](void* body, Pool& pool, uint64_t turn) {
        Team team(&pool, turn);
        (*(const Body*)body)(team);
        return team.leave();
    };
    pool->call();
    pool->job(pool->body, *pool, pool->turns.load());
}

}  // namespace
