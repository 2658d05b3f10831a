#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

// What a cgroup v2 container allows. Parsing is apart from reading so that it can be tested on
// text.
namespace alignpro::cgroup {

// CPUs that a cpu.max line ("QUOTA PERIOD" or "max PERIOD") grants, rounded up, at least 1.
// Nothing when it sets no limit or cannot be understood.
inline std::optional<int> cpus_from_quota(const std::string& cpu_max) {
  std::istringstream in(cpu_max);
  int64_t quota = 0, period = 0;
  if (!(in >> quota >> period) || quota <= 0 || period <= 0) return std::nullopt;
  const int64_t cpus = quota / period + (quota % period != 0 ? 1 : 0);
  return static_cast<int>(std::min<int64_t>(cpus, std::numeric_limits<int>::max()));
}

// The v2 path in the text of /proc/self/cgroup (the line "0::PATH"); nothing under v1.
inline std::optional<std::string> path_from_membership(const std::string& text) {
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  }
  return std::nullopt;
}

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// This process's group and its ancestors: a limit holds if any of them sets it.
inline std::vector<std::filesystem::path> directories() {
  namespace fs = std::filesystem;
  const fs::path mount = "/sys/fs/cgroup";
  const auto membership = path_from_membership(read_text("/proc/self/cgroup"));
  if (!membership) return {};
  std::vector<fs::path> all = {mount};
  fs::path at = mount;
  for (const fs::path& part : fs::path(*membership).relative_path()) {
    if (part.empty() || part == "..") continue;  // ".." where the namespace hides the ancestors
    all.push_back(at /= part);
  }
  return all;
}

// The number that follows `key` in text of lines "KEY NUMBER" (memory.stat, /proc/meminfo).
inline std::optional<int64_t> value_of(const std::string& text, const std::string& key) {
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    std::string name;
    int64_t value = 0;
    if (fields >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

// Bytes this process could still use: what the kernel says is available, and the smallest room left
// under any memory.max (inactive file pages are given back before anyone is killed).
inline int64_t available_memory() {
  int64_t bytes = value_of(read_text("/proc/meminfo"), "MemAvailable:").value_or(1 << 20) * 1024;
  for (const auto& directory : directories()) {
    int64_t limit = 0, current = 0;
    if (!(std::istringstream(read_text(directory / "memory.max")) >> limit)) continue;  // "max"
    if (!(std::istringstream(read_text(directory / "memory.current")) >> current)) continue;
    const auto file = value_of(read_text(directory / "memory.stat"), "inactive_file");
    bytes = std::min(bytes, std::max<int64_t>(0, limit - current + file.value_or(0)));
  }
  return bytes;
}

}  // namespace alignpro::cgroup
