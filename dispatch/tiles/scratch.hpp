// Scratch memory of a calling thread: grows to what was asked for and stays, so that a steady server allocates
// nothing. Freed when the thread ends.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdlib>

namespace dks {

// `bytes` bytes, 64-byte aligned, valid until this thread's next call; null where memory ran out.
inline void* scratch(std::size_t bytes) {
  struct Block {
    void* memory;
    std::size_t size;
  };
  static thread_local Block block{nullptr, 0};
  static const pthread_key_t key = [] {
    pthread_key_t made;
    pthread_key_create(&made, std::free);
    return made;
  }();
  if (block.size < bytes) {
    const std::size_t size = (bytes + 4095) / 4096 * 4096;
    void* memory = std::aligned_alloc(64, size);
    if (memory == nullptr) return nullptr;
    std::free(block.memory);
    block = {memory, size};
    pthread_setspecific(key, memory);
  }
  return block.memory;
}

}  // namespace dks
