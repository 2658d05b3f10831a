#pragma once

#include <memory>
#include <mutex>
#include <utility>

namespace alignpro {

// Keeps one T between uses, where making one costs more than a use takes. Any thread.
template <typename T>
class BufferPool {
 public:
  std::unique_ptr<T> take() {
    const std::lock_guard lock(mutex_);
    return spare_ != nullptr ? std::move(spare_) : std::make_unique<T>();
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
