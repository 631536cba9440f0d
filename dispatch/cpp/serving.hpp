// What a C++ server keeps at run time, beside the lookup: the generation that serves, swapped while threads dispatch;
// counters; rules that are switched off after failures. C++17, header only, no dependency. Nothing of a call allocates.
//
//   dks::Tables<> tables;                                          // one for the process
//   tables.publish(std::make_shared<dks::Generation>(my::table, "7"));
//   dks::Tables<>::Reader reader(tables);                          // one for each thread
//   auto call = reader.enter();                                    // all that is asked of `call` is of one generation
//   const dks::Choice choice = call.choose(group, {tokens}, align);
//
// In the child of a fork readers serve on, since they take no lock; publish(), rollback(), current() and total() do, and
// wait for good there if another thread was in one of them. So fork while no thread is.
#ifndef DKS_SERVING_HPP
#define DKS_SERVING_HPP

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lookup.hpp"

namespace dks {

// What became of a call. The first seven are the lookup's own answers; the last three are added where a hit could not
// be launched after all.
enum class Outcome : std::int32_t {
  exact, bin, nearest,                                // hits
  zero_sized, out_of_range, unmeasured, misaligned,   // misses
  switched_off,                                       // a hit whose rule had failed too often
  declined,                                           // the kernel declined these values
  failed,                                             // the kernel failed
  unsupported,                                        // no kernel that a C++ server has
};
inline constexpr std::int32_t outcomes = 11;
inline constexpr const char* outcome_names[] = {"exact",    "bin",     "nearest",   "zero_sized",
                                                "out_of_range", "unmeasured", "misaligned", "switched_off",
                                                "declined", "failed",  "unsupported"};

// One table with its counters and switches. What a server binds to a table (packed weights, functions) belongs into a
// class derived from this one, so that it is swapped with it.
class Generation {
 public:
  // Arguments: table, which must live as long as `owner` or the process; id, to tell generations apart; owner, what
  // keeps the table's memory; failures, after how many a rule is switched off.
  explicit Generation(const Table& table, std::string id = "", std::shared_ptr<const void> owner = nullptr,
                      std::int32_t failures = 3)
      : table_(&table), id_(std::move(id)), owner_(std::move(owner)), allowed_(failures),
        failures_(new std::atomic<std::int32_t>[static_cast<std::size_t>(table.rule_count)]()) {}
  virtual ~Generation() = default;
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  const Table& table() const { return *table_; }
  const std::string& id() const { return id_; }
  bool switched_off(std::int32_t rule) const {
    return failures_[static_cast<std::size_t>(rule)].load(std::memory_order_relaxed) >= allowed_;
  }

  // Calls of a group that had this outcome; group_count stands for calls of groups that do not exist.
  std::uint64_t count(std::int32_t group, Outcome outcome) const {
    std::uint64_t sum = 0;
    for (std::size_t reader = 0; reader < readers_; ++reader)
      sum += of_reader(reader)[row(group) + static_cast<std::size_t>(outcome)].load(std::memory_order_relaxed);
    return sum;
  }

 private:
  template <class>
  friend class Tables;
  static constexpr std::size_t row_size = 16;  // counters of a group, of which `outcomes` are used

  // One line of memory is never shared by two readers.
  void reserve(std::size_t readers) {
    if (counts_ != nullptr) throw std::logic_error("publish: found a generation that was published before; use rollback");
    stride_ = static_cast<std::size_t>(table_->group_count + 1) * row_size + 8;
    readers_ = readers;
    counts_.reset(new std::atomic<std::uint64_t>[stride_ * readers]());
  }

  std::atomic<std::uint64_t>* of_reader(std::size_t reader) const { return counts_.get() + reader * stride_; }

  // Calls of groups that do not exist are counted behind those that do.
  std::size_t row(std::int32_t group) const {
    const auto known = static_cast<std::uint32_t>(table_->group_count);
    return std::size_t{std::min(static_cast<std::uint32_t>(group), known)} * row_size;
  }

  // Only the reader's own thread writes here: no other write can be lost between the load and the store.
  void note(std::atomic<std::uint64_t>* counts, std::int32_t group, std::int32_t outcome) const {
    std::atomic<std::uint64_t>& held = counts[row(group) + static_cast<std::size_t>(outcome)];
    held.store(held.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  Choice choose(std::atomic<std::uint64_t>* counts, std::int32_t group, const std::int64_t* sizes, std::size_t count,
                std::int32_t align) const {
    const std::int32_t code = ask(*table_, group, sizes, count, align);
    if (code >= 0 && any_off_.load(std::memory_order_relaxed) && switched_off(code >> 2)) {
      note(counts, group, static_cast<std::int32_t>(Outcome::switched_off));
      return choice_of(*table_, miss(Miss::unmeasured));
    }
    note(counts, group, code >= 0 ? code & 3 : 2 - code);  // a miss is -1 - miss, and the first of them comes third
    return choice_of(*table_, code);
  }

  void fail(std::atomic<std::uint64_t>* counts, std::int32_t group, std::int32_t rule) const {
    note(counts, group, static_cast<std::int32_t>(Outcome::failed));
    std::atomic<std::int32_t>& held = failures_[static_cast<std::size_t>(rule)];
    if (held.load(std::memory_order_relaxed) < allowed_) held.fetch_add(1, std::memory_order_relaxed);
    if (switched_off(rule)) any_off_.store(true, std::memory_order_relaxed);
  }

  const Table* table_;
  std::string id_;
  std::shared_ptr<const void> owner_;
  std::int32_t allowed_;
  std::unique_ptr<std::atomic<std::int32_t>[]> failures_;  // by rule
  std::unique_ptr<std::atomic<std::uint64_t>[]> counts_;   // [reader][group][outcome]
  mutable std::atomic<bool> any_off_{false};
  std::size_t stride_ = 0, readers_ = 0;
};

// Holds the generation that serves and the one before it. Readers enter without waiting, whatever writers do; writers
// wait for each other.
//
// How memory is reclaimed: a reader that enters writes the current epoch into a place of its own, and zero when it
// leaves. A writer swaps the pointer first and ends the epoch after it. So a reader of a later epoch sees the new
// pointer, and a generation that was dropped in epoch e is deleted once every reader is outside or entered after e.
// All of these loads and stores are sequentially consistent: either the writer sees the reader's epoch, or the reader
// sees the writer's pointer.
template <class G = Generation>
class Tables {
 public:
  // At most so many generations wait for readers that may still see them; then publish() waits too.
  static constexpr std::size_t most_dropped = 64;

  // readers: most readers at a time.
  explicit Tables(std::size_t readers = 256) : slots_(readers) {}

  // Every reader must be gone.
  ~Tables() = default;
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

  class Reader;

  // From entering to its end: what is asked of it is of one generation.
  class Guard {
   public:
    explicit Guard(Reader& reader) : reader_(reader), seen_(reader.begin()) {}
    ~Guard() { reader_.end(); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    // Whether there is a generation: before the first publish() there is none, and every call is a miss.
    explicit operator bool() const { return seen_ != nullptr; }
    const G& operator*() const { return *seen_; }
    const G* operator->() const { return seen_; }

    // What dks::choose answers, counted; a rule that was switched off is a miss.
    Choice choose(std::int32_t group, const std::int64_t* sizes, std::size_t count, std::int32_t align) const {
      if (seen_ == nullptr) return {"", Match::nearest, -1, false, Miss::unmeasured};
      return base().choose(reader_.counts_, group, sizes, count, align);
    }
    Choice choose(std::int32_t group, std::initializer_list<std::int64_t> sizes, std::int32_t align) const {
      return choose(group, sizes.begin(), sizes.size(), align);
    }

    // The kernel of a rule that was chosen failed: the caller serves its default, and the rule is switched off when it
    // has failed too often.
    void report_failure(std::int32_t group, std::int32_t rule) const { base().fail(reader_.counts_, group, rule); }

    // Counts why a hit was not launched.
    void note(std::int32_t group, Outcome outcome) const { base().note(reader_.counts_, group, static_cast<std::int32_t>(outcome)); }

   private:
    const Generation& base() const { return *seen_; }

    Reader& reader_;
    const G* seen_;
  };

  // A thread's own way in; no two threads use one at a time.
  class Reader {
   public:
    // Raises std::runtime_error where there are as many readers as the holder has room for.
    explicit Reader(Tables& tables) : tables_(tables), slot_(tables.take()) {}
    ~Reader() { tables_.slots_[slot_].taken.store(false, std::memory_order_release); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Inside another guard of this reader, the same generation again: a request that asks for many layers can enter
    // once and be served by one table throughout.
    Guard enter() { return Guard(*this); }

   private:
    friend class Guard;

    const G* begin() {
      if (depth_++ == 0) {
        tables_.slots_[slot_].epoch.store(tables_.epoch_.load());
        seen_ = tables_.current_.load();
        if (seen_ != nullptr) counts_ = static_cast<const Generation*>(seen_)->of_reader(slot_);
      }
      return seen_;
    }

    void end() {
      if (--depth_ == 0) tables_.slots_[slot_].epoch.store(0, std::memory_order_release);
    }

    Tables& tables_;
    std::size_t slot_;
    std::int32_t depth_ = 0;
    const G* seen_ = nullptr;
    std::atomic<std::uint64_t>* counts_ = nullptr;  // of what is seen
  };

  // From now on `next` serves; the one before it stays in memory for rollback().
  //
  // Raises std::runtime_error, with nothing changed, where readers did not leave for `patience` though too many
  // generations wait to be deleted; std::logic_error where `next` was published before.
  void publish(std::shared_ptr<G> next, std::chrono::milliseconds patience = std::chrono::seconds(1)) {
    next->reserve(slots_.size());
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (true) {
      std::vector<Dropped> free;  // destroyed outside of the lock
      {
        const std::lock_guard<std::mutex> lock(writing_);
        reclaim(free);
        if (dropped_.size() < most_dropped) {
          current_.store(next.get());
          const std::uint64_t last = epoch_.fetch_add(1);
          if (before_ != nullptr) dropped_.push_back({std::move(before_), last});
          before_ = std::move(serving_);
          serving_ = std::move(next);
          return;
        }
      }
      if (std::chrono::steady_clock::now() > deadline) {
        next->counts_.reset();
        throw std::runtime_error("publish: found readers that still use old tables, expected calls to end; try again");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

  // The generation before this one serves again; once more, and this one does. False where there is none. Needs no
  // disk, and does not wait for readers.
  bool rollback() {
    const std::lock_guard<std::mutex> lock(writing_);
    if (before_ == nullptr) return false;
    std::swap(serving_, before_);
    current_.store(serving_.get());
    epoch_.fetch_add(1);
    return true;
  }

  // What serves now, kept alive for the caller; null before the first publish(). Not for calls: see Reader.
  std::shared_ptr<const G> current() const {
    const std::lock_guard<std::mutex> lock(writing_);
    return serving_;
  }

  // Calls with this outcome since the start, of all generations.
  std::uint64_t total(Outcome outcome) const {
    const std::lock_guard<std::mutex> lock(writing_);
    std::uint64_t sum = deleted_[static_cast<std::size_t>(outcome)];
    for (const G* held : {serving_.get(), before_.get()}) sum += held == nullptr ? 0 : sum_of(*held, outcome);
    for (const Dropped& held : dropped_) sum += sum_of(*held.generation, outcome);
    return sum;
  }

 private:
  struct alignas(64) Slot {
    std::atomic<std::uint64_t> epoch{0};  // 0: outside
    std::atomic<bool> taken{false};
  };
  struct Dropped {
    std::shared_ptr<G> generation;
    std::uint64_t epoch;
  };

  std::size_t take() {
    for (std::size_t slot = 0; slot < slots_.size(); ++slot)
      if (!slots_[slot].taken.exchange(true)) return slot;
    throw std::runtime_error("reader: found " + std::to_string(slots_.size()) +
                             " readers already, expected one a thread; make Tables with room for more");
  }

  static std::uint64_t sum_of(const Generation& generation, Outcome outcome) {
    std::uint64_t sum = 0;
    for (std::int32_t group = 0; group <= generation.table().group_count; ++group)
      sum += generation.count(group, outcome);
    return sum;
  }

  // Moves what no reader can see any more to `free`.
  void reclaim(std::vector<Dropped>& free) {
    std::uint64_t oldest = epoch_.load();
    for (const Slot& slot : slots_)
      if (const std::uint64_t entered = slot.epoch.load(); entered != 0 && entered < oldest) oldest = entered;
    std::size_t kept = 0;
    for (Dropped& held : dropped_) {
      if (held.epoch >= oldest) {
        if (&dropped_[kept] != &held) dropped_[kept] = std::move(held);
        ++kept;
        continue;
      }
      for (std::int32_t i = 0; i < outcomes; ++i)
        deleted_[static_cast<std::size_t>(i)] += sum_of(*held.generation, static_cast<Outcome>(i));
      free.push_back(std::move(held));
    }
    dropped_.resize(kept);
  }

  alignas(64) std::atomic<const G*> current_{nullptr};
  std::atomic<std::uint64_t> epoch_{1};
  std::vector<Slot> slots_;
  alignas(64) mutable std::mutex writing_;  // guards what follows
  std::shared_ptr<G> serving_, before_;
  std::vector<Dropped> dropped_;
  std::uint64_t deleted_[outcomes] = {};
};

}  // namespace dks

#endif  // DKS_SERVING_HPP
