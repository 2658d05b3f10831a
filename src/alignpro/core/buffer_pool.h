#pragma once

#include <memory>
#include <mutex>
#include <utility>

namespace alignpro {

// Keeps one T between uses, where making one costs more than a use takes. Any thread.
template <typename T>
class BufferPool {
 public:
  // What was given back, or one made from `arguments`.
  template <typename... Arguments>
  std::unique_ptr<T> take(Arguments&&... arguments) {
    {
      const std::lock_guard lock(mutex_);
      if (spare_ != nullptr) return std::move(spare_);
    }
    return std::make_unique<T>(std::forward<Arguments>(arguments)...);
  }
  void give_back(std::unique_ptr<T> used) {
    const std::lock_guard lock(mutex_);
    spare_ = std::move(used);
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<T> spare_;
};

}  // namespace alignpro
