// Opens a generated package from C++ while the server runs: checked first, then loaded; no Python, no compiler.
// C++17 and Linux, header only; link with -ldl where libc is older than 2.34.
#ifndef DKS_PACKAGE_HPP
#define DKS_PACKAGE_HPP

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "package_data.hpp"

namespace dks {

// SHA-256 in hex (FIPS 180-4).
inline std::string sha256(std::string_view text) {
  static constexpr std::uint32_t k[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  std::uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const auto turn = [](std::uint32_t x, int by) { return x >> by | x << (32 - by); };
  std::string tail(text.substr(text.size() / 64 * 64));
  tail += '\x80';
  tail.append((120 - tail.size() % 64) % 64, '\0');
  for (int shift = 56; shift >= 0; shift -= 8)
    tail += static_cast<char>(static_cast<std::uint64_t>(text.size()) * 8 >> shift & 255);
  const std::size_t whole = text.size() / 64 * 64;
  for (std::size_t at = 0; at < whole + tail.size(); at += 64) {
    const char* block = at < whole ? text.data() + at : tail.data() + (at - whole);
    std::uint32_t w[64] = {};
    for (std::size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | static_cast<unsigned char>(block[i]);
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + w[i - 7] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
             (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    std::uint32_t v[8];
    std::memcpy(v, h, sizeof h);
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t one = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) +
                                ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
      const std::uint32_t two = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) +
                                ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      std::memmove(v + 1, v, 7 * sizeof *v);
      v[4] += one;
      v[0] = one + two;
    }
    for (int i = 0; i < 8; ++i) h[i] += v[i];
  }
  std::string hex;
  for (const std::uint32_t word : h)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

// An open package: its table and its kernels. They live as long as it does.
class Package {
 public:
  // Checks `folder`, then loads what a C++ server needs of it.
  //
  // Arguments: folder, that dks-codegen wrote; threads, how many a kernel may take in this process, which must be what
  // the package was measured with.
  //
  // Raises std::runtime_error that names what does not fit, before any of the package's code is loaded: a folder or
  // file of another owner or that others may write, a link, a file that differs from the manifest, another CPU, other
  // threads, another version.
  static std::shared_ptr<const Package> open(const std::string& folder, int threads) {
    return std::shared_ptr<const Package>(new Package(folder, threads));
  }
  ~Package() {
    if (library_ != nullptr) dlclose(library_);
    if (file_ >= 0) close(file_);
  }
  Package(const Package&) = delete;
  Package& operator=(const Package&) = delete;

  const PackageData& data() const { return *data_; }
  const Table& table() const { return *data_->table; }

  // The kernel that a rule runs; null where it is none of the package's own, such as torch.linear.
  const Kernel* kernel(std::int32_t rule) const {
    const std::int32_t index = data_->kernel_of[rule];
    return index < 0 ? nullptr : data_->kernels + index;
  }

  // Its function, to be cast to the signature of its kind in abi.h.
  void* function(const Kernel& kernel) const { return functions_[static_cast<std::size_t>(&kernel - data_->kernels)]; }

 private:
  static constexpr off_t most_bytes = 64 << 20;

  Package(const std::string& folder, int threads) {
    const int at = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (at < 0) refuse(folder, std::strerror(errno), "a folder that dks-codegen wrote");
    const Closer closer{at};
    check_owner(at, folder);
    const std::string manifest = read(at, folder, "manifest.json");
    const std::string table = read(at, folder, "_server.so");
    check_digest(folder, manifest, "_server.so", sha256(table));
    try {
      library_ = load(folder + "/_server.so", table, file_);
      bind(at, folder, manifest, threads);
    } catch (...) {
      if (library_ != nullptr) dlclose(library_);
      if (file_ >= 0) close(file_);
      throw;
    }
  }

  void bind(int at, const std::string& folder, const std::string& manifest, int threads) {
    using Get = const PackageData* (*)();
    const auto get = reinterpret_cast<Get>(dlsym(library_, "dks_package"));
    if (get == nullptr) refuse(folder + "/_server.so", "no dks_package", "a library that dks-codegen compiled");
    data_ = get();
    if (data_->abi != package_abi)
      refuse(folder, "version " + std::to_string(data_->abi), "version " + std::to_string(package_abi));
    check_machine(folder, threads);
    if (data_->kernel_count == 0) return;
    const std::string kernels = read(at, folder, "_kernels.so");
    const std::string digest = sha256(kernels);
    check_digest(folder, manifest, "_kernels.so", digest);
    void* library = keep(folder + "/_kernels.so", kernels, digest);
    for (std::int32_t i = 0; i < data_->kernel_count; ++i) {
      functions_.push_back(dlsym(library, data_->kernels[i].symbol));
      if (functions_.back() == nullptr) refuse(folder + "/_kernels.so", "no " + std::string(data_->kernels[i].symbol), "it");
    }
  }

  struct Closer {
    int file;
    ~Closer() { close(file); }
  };

  [[noreturn]] static void refuse(const std::string& what, const std::string& found, const std::string& expected) {
    throw std::runtime_error(what + ": found " + found + ", expected " + expected +
                             "; build the package on this machine, for this server");
  }

  static struct stat check_owner(int file, const std::string& path) {
    struct stat status;
    if (fstat(file, &status) != 0) refuse(path, std::strerror(errno), "a readable file");
    if (status.st_uid != 0 && status.st_uid != geteuid())
      refuse(path, "owner " + std::to_string(status.st_uid), "this process' own user, or root");
    if ((status.st_mode & S_IWOTH) != 0) refuse(path, "that others may write there", "no such permission (chmod o-w)");
    return status;
  }

  static std::string read(int at, const std::string& folder, const char* name) {
    const std::string path = folder + "/" + name;
    const int file = openat(at, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) refuse(path, std::strerror(errno), "a file of the package");
    const Closer closer{file};
    const struct stat status = check_owner(file, path);
    if (!S_ISREG(status.st_mode) || status.st_size > most_bytes)
      refuse(path, std::to_string(status.st_size) + " bytes or no plain file", "at most 64 MiB");
    std::string text(static_cast<std::size_t>(status.st_size), '\0');
    for (std::size_t done = 0; done < text.size();) {
      const ssize_t got = ::read(file, &text[done], text.size() - done);
      if (got <= 0) refuse(path, "an unreadable or shrinking file", "a file that nobody writes to");
      done += static_cast<std::size_t>(got);
    }
    return text;
  }

  // The manifest is JSON that dks-codegen wrote, one entry a line.
  static void check_digest(const std::string& folder, const std::string& manifest, const std::string& name,
                           const std::string& digest) {
    if (manifest.find("\n    \"" + name + "\": \"" + digest + "\"") == std::string::npos)
      refuse(folder + "/" + name, "digest " + digest.substr(0, 16) + "...", "the one in manifest.json");
  }

  // Loads these very bytes, which were checked, from memory: nobody can change them any more, and a package that was
  // replaced at the same path is not taken for the one that is loaded (dlopen goes by names). For that, `file` must
  // stay open as long as the library is.
  static void* load(const std::string& path, const std::string& bytes, int& file) {
    file = memfd_create("dks", MFD_CLOEXEC | 0x10u);  // MFD_EXEC, which newer systems want to be told
    if (file < 0) file = memfd_create("dks", MFD_CLOEXEC);
    std::size_t done = 0;
    while (file >= 0 && done < bytes.size()) {
      const ssize_t put = write(file, bytes.data() + done, bytes.size() - done);
      if (put <= 0) break;
      done += static_cast<std::size_t>(put);
    }
    if (file < 0 || done < bytes.size()) refuse(path, std::strerror(errno), "room in memory for it");
    void* library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) refuse(path, dlerror(), "a library that loads here");
    return library;
  }

  // Kernels stay loaded, once for each content: threads of OpenMP may be inside, and each keeps scratch memory under a
  // key of which a process has only 1024.
  static void* keep(const std::string& path, const std::string& bytes, const std::string& digest) {
    static std::mutex mutex;
    static std::map<std::string, void*> loaded;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = loaded.find(digest);
    if (found != loaded.end()) return found->second;
    int file = -1;
    return loaded[digest] = load(path, bytes, file);
  }

  void check_machine(const std::string& folder, int threads) const {
    std::map<std::string, std::string> info = cpu();
    const std::string arch = describe(info);
    if (arch != data_->arch) refuse(folder + ": arch", arch, data_->arch);
    std::istringstream isa(data_->isa);
    const std::string flags = " " + info["flags"] + info["Features"] + " ";
    for (std::string one; std::getline(isa, one, '+');)
      if (one != "baseline" && flags.find(" " + one + " ") == std::string::npos)
        refuse(folder + ": isa", "a CPU without " + one, data_->isa);
    if (std::to_string(threads) != data_->threads)
      refuse(folder + ": threads", std::to_string(threads), data_->threads);
    // What else dks/dispatch/switches.py knows is read by PyTorch's libraries, and none of them runs here.
    for (const Switch* one = data_->switches; one != data_->switches + data_->switch_count; ++one) {
      const std::string here = value_of(*one), measured = one->value;
      if (here != measured)
        refuse(folder + ": " + one->name, here.empty() ? "its default" : here, measured.empty() ? "its default" : measured);
    }
  }

  // In this process, as switches.py writes it: one word in capitals, empty at its default.
  static std::string value_of(const Switch& one) {
    const char* text = std::getenv(one.name);
    std::istringstream words(text == nullptr ? "" : text);
    std::string value;
    for (std::string word; words >> word;) value += (value.empty() ? "" : "_") + word;
    for (char& letter : value)
      if (letter >= 'a' && letter <= 'z') letter = static_cast<char>(letter - 'a' + 'A');
    return std::string(one.defaults).find(" " + value + " ") == std::string::npos ? value : "";
  }

  // What /proc/cpuinfo says of the first processor.
  static std::map<std::string, std::string> cpu() {
    std::map<std::string, std::string> info;
    const int file = ::open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
    if (file < 0) return info;
    const Closer closer{file};
    std::string text;
    char part[4096];
    for (ssize_t got; text.find("\n\n") == std::string::npos && (got = ::read(file, part, sizeof part)) > 0;)
      text.append(part, static_cast<std::size_t>(got));
    std::istringstream lines(text.substr(0, text.find("\n\n")));
    for (std::string line; std::getline(lines, line);) {
      const std::size_t colon = line.find(':');
      if (colon == std::string::npos) continue;
      const std::string name = line.substr(0, colon), value = line.substr(colon + 1);
      info[name.substr(0, name.find_last_not_of(" \t") + 1)] = value.empty() ? value : value.substr(1);
    }
    return info;
  }

  // As dks/dispatch/environment.py describes a CPU.
  static std::string describe(std::map<std::string, std::string>& info) {
    std::string text;
    const auto add = [&](const char* key, bool must) {
      if (info.count(key) != 0 || must) text += (text.empty() ? "" : " ") + (info.count(key) != 0 ? info[key] : "unknown");
    };
    if (info.count("vendor_id") != 0) {
      for (const char* key : {"vendor_id", "cpu family", "model", "stepping"}) add(key, true);
      return text;
    }
    for (const char* key : {"CPU implementer", "CPU part", "CPU variant", "CPU revision"}) add(key, false);
    struct utsname machine;
    return text.empty() || uname(&machine) != 0 ? "unknown here" : machine.machine + (" " + text);
  }

  void* library_ = nullptr;
  int file_ = -1;
  const PackageData* data_ = nullptr;
  std::vector<void*> functions_;
};

}  // namespace dks

#endif  // DKS_PACKAGE_HPP
