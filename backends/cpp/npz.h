// Arrays in NumPy's .npz files: read and written, nothing but the standard library (and zlib, where NPZ_ZLIB is defined).
//
// A .npz is a zip archive with a .npy file for every array. Files are untrusted: every length is checked against the bytes
// that are there, names and contents by the archive's checksums. What is not understood is refused with one sentence.

#ifndef GRAPHOPT_NPZ_H
#define GRAPHOPT_NPZ_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#ifdef NPZ_ZLIB
#include <zlib.h>
#endif

namespace npz {

struct Array {
  std::string type;  // NumPy's letter and bytes: "f4", "i8", "b1"
  std::vector<int64_t> shape;
  std::vector<char> data;  // row after row, in this machine's byte order

  size_t count() const {
    size_t n = 1;
    for (int64_t size : shape) n *= static_cast<size_t>(size);
    return n;
  }
};

using Arrays = std::map<std::string, Array>;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

using Bytes = std::vector<char>;

inline bool little_endian() {
  const uint16_t one = 1;
  char first;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

inline uint64_t number(const Bytes& bytes, uint64_t at, int width) {
  if (at > bytes.size() || bytes.size() - at < static_cast<uint64_t>(width)) throw Error("the archive ends too early");
  uint64_t value = 0;
  for (int i = 0; i < width; ++i) value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
  return value;
}

inline Bytes slice(const Bytes& bytes, uint64_t at, uint64_t length) {
  if (at > bytes.size() || length > bytes.size() - at) throw Error("the archive ends too early");
  return Bytes(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.begin() + static_cast<std::ptrdiff_t>(at + length));
}

inline uint32_t crc32_of(const char* data, size_t length) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> made(256);
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      made[i] = c;
    }
    return made;
  }();
  uint32_t c = 0xFFFFFFFFu;
  for (size_t i = 0; i < length; ++i) c = table[(c ^ static_cast<unsigned char>(data[i])) & 0xFF] ^ (c >> 8);
  return c ^ 0xFFFFFFFFu;
}

inline Bytes inflate(const Bytes& packed, uint64_t length, const std::string& name) {
#ifdef NPZ_ZLIB
  if (packed.size() > UINT32_MAX || length > UINT32_MAX) throw Error("array '" + name + "' is too large to unpack");
  Bytes out(length);
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw Error("zlib cannot start");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(length);
  const int status = ::inflate(&stream, Z_FINISH);
  const bool whole = stream.total_out == length;
  inflateEnd(&stream);
  if (status != Z_STREAM_END || !whole) throw Error("array '" + name + "' is damaged");
  return out;
#else
  (void)packed;
  (void)length;
  throw Error("array '" + name + "' is compressed: write it with numpy.savez, or build this program with zlib");
#endif
}

// The value of `key` in the header's dictionary, as text up to the comma that ends it.
inline std::string entry(const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) throw Error("a .npy header has no '" + key + "'");
  size_t from = header.find_first_not_of(' ', at + key.size() + 3);
  if (from == std::string::npos) throw Error("a .npy header ends too early");
  const char close = header[from] == '(' ? ')' : header[from] == '\'' ? '\'' : ',';
  const size_t to = header.find(close, from + 1);
  if (to == std::string::npos) throw Error("a .npy header ends too early");
  return header.substr(from, to - from + (close == ',' ? 0 : 1));
}

inline size_t width_of(const std::string& type) {
  static const std::map<std::string, size_t> widths = {
      {"b1", 1}, {"i1", 1}, {"u1", 1}, {"i2", 2}, {"u2", 2}, {"f2", 2}, {"i4", 4},
      {"u4", 4}, {"f4", 4}, {"i8", 8}, {"u8", 8}, {"f8", 8}};
  const auto found = widths.find(type);
  return found == widths.end() ? 0 : found->second;
}

// Columns after columns to rows after rows.
inline Bytes in_rows(const Bytes& data, const std::vector<int64_t>& shape, size_t width) {
  Bytes out(data.size());
  std::vector<int64_t> at(shape.size(), 0);
  for (size_t target = 0; target * width < data.size(); ++target) {
    size_t source = 0;
    for (size_t axis = shape.size(); axis-- > 0;) source = source * static_cast<size_t>(shape[axis]) + static_cast<size_t>(at[axis]);
    std::memcpy(&out[target * width], &data[source * width], width);
    for (size_t axis = shape.size(); axis-- > 0;) {
      if (++at[axis] < shape[axis]) break;
      at[axis] = 0;
    }
  }
  return out;
}

inline Array parse(const Bytes& file, const std::string& name) {
  if (file.size() < 10 || std::memcmp(file.data(), "\x93NUMPY", 6) != 0) throw Error("'" + name + "' is no .npy file");
  const int wide = file[6] == 1 ? 2 : 4;
  const uint64_t length = number(file, 8, wide);
  const Bytes text = slice(file, 8 + wide, length);
  const std::string header(text.begin(), text.end());
  Array array;
  const std::string type = entry(header, "descr");
  const std::string what = "array '" + name + "' has type " + type;
  if (type.size() != 5) throw Error(what + ", which is not read: numbers and booleans are");
  array.type = type.substr(2, 2);
  const size_t width = width_of(array.type);
  if (!width) throw Error(what + ", which is not read: numbers and booleans are");
  if (width > 1 && type[1] != (little_endian() ? '<' : '>')) throw Error(what + ", in the other byte order");
  const std::string shape = entry(header, "shape");
  uint64_t count = 1;
  for (size_t at = 0; at < shape.size();) {
    if (shape[at] < '0' || shape[at] > '9') {
      ++at;
      continue;
    }
    char* end = nullptr;
    const unsigned long long size = std::strtoull(&shape[at], &end, 10);
    at = static_cast<size_t>(end - shape.data());
    if (size && count > UINT64_MAX / 16 / size) throw Error("array '" + name + "' is too large");
    count *= size;
    array.shape.push_back(static_cast<int64_t>(size));
  }
  array.data = slice(file, 8 + wide + length, count * width);
  if (entry(header, "fortran_order") == "True" && array.shape.size() > 1) array.data = in_rows(array.data, array.shape, width);
  return array;
}

inline std::string format(const Array& array) {
  std::string shape;
  for (int64_t size : array.shape) shape += std::to_string(size) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  const char order = width_of(array.type) == 1 ? '|' : little_endian() ? '<' : '>';
  std::string header = "{'descr': '" + std::string(1, order) + array.type + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header += std::string(63 - (10 + header.size()) % 64, ' ') + "\n";
  std::string out = "\x93NUMPY";
  out += std::string("\1\0", 2);
  out += static_cast<char>(header.size() & 0xFF);
  out += static_cast<char>(header.size() >> 8);
  return out + header;
}

inline void put(std::string& out, uint64_t value, int width) {
  for (int i = 0; i < width; ++i) out += static_cast<char>(value >> (8 * i) & 0xFF);
}

// The 64-bit number `index` of the extra field that large archives keep sizes in.
inline uint64_t wide_number(const Bytes& bytes, uint64_t at, uint64_t length, int index) {
  for (const uint64_t end = at + length; at + 4 <= end;) {
    const uint64_t kind = number(bytes, at, 2), size = number(bytes, at + 2, 2);
    if (kind == 1 && static_cast<uint64_t>(8 * index + 8) <= size) return number(bytes, at + 4 + 8 * index, 8);
    at += 4 + size;
  }
  throw Error("the archive's directory is damaged");
}

}  // namespace detail

// The arrays of a .npz by name.
inline Arrays read(const std::string& path) {
  using namespace detail;
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Error("cannot be opened");
  const Bytes file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (file.size() < 22) throw Error("is no .npz file");
  uint64_t end = file.size() - 22;
  const uint64_t lowest = end > 65535 ? end - 65535 : 0;
  while (number(file, end, 4) != 0x06054b50) {
    if (end-- == lowest) throw Error("is no .npz file");
  }
  uint64_t entries = number(file, end + 10, 2), at = number(file, end + 16, 4);
  if (end >= 20 && number(file, end - 20, 4) == 0x07064b50) {
    const uint64_t wide = number(file, end - 12, 8);
    if (number(file, wide, 4) != 0x06064b50) throw Error("the archive's directory is damaged");
    entries = number(file, wide + 32, 8);
    at = number(file, wide + 48, 8);
  }
  Arrays arrays;
  for (uint64_t i = 0; i < entries; ++i) {
    if (number(file, at, 4) != 0x02014b50) throw Error("the archive's directory is damaged");
    const uint64_t method = number(file, at + 10, 2), name_length = number(file, at + 28, 2);
    const uint64_t extra = number(file, at + 30, 2), comment = number(file, at + 32, 2);
    uint64_t packed = number(file, at + 20, 4), length = number(file, at + 24, 4), start = number(file, at + 42, 4);
    const Bytes raw = slice(file, at + 46, name_length);
    std::string name(raw.begin(), raw.end());
    int wide = 0;
    if (length == 0xFFFFFFFFu) length = wide_number(file, at + 46 + name_length, extra, wide++);
    if (packed == 0xFFFFFFFFu) packed = wide_number(file, at + 46 + name_length, extra, wide++);
    if (start == 0xFFFFFFFFu) start = wide_number(file, at + 46 + name_length, extra, wide++);
    if (number(file, at + 8, 2) & 1) throw Error("array '" + name + "' is encrypted");
    if (number(file, start, 4) != 0x04034b50) throw Error("the archive's directory is damaged");
    const uint64_t body = start + 30 + number(file, start + 26, 2) + number(file, start + 28, 2);
    Bytes content = slice(file, body, packed);
    if (method == 8) {
      content = inflate(content, length, name);
    } else if (method != 0) {
      throw Error("array '" + name + "' is compressed by method " + std::to_string(method) + ", which is not read");
    }
    if (crc32_of(content.data(), content.size()) != number(file, at + 16, 4)) throw Error("array '" + name + "' is damaged");
    if (name.size() > 4 && name.compare(name.size() - 4, 4, ".npy") == 0) name.resize(name.size() - 4);
    if (!arrays.emplace(name, parse(content, name)).second) throw Error("array '" + name + "' is there twice");
    at += 46 + name_length + extra + comment;
  }
  return arrays;
}

// Write arrays as an uncompressed .npz; the file appears when it is complete.
inline void write(const std::string& path, const Arrays& arrays) {
  using namespace detail;
  const std::string draft = path + ".part";
  std::ofstream stream(draft, std::ios::binary | std::ios::trunc);
  if (!stream) throw Error("cannot be written");
  std::string directory;
  uint64_t at = 0;
  for (const auto& [name, array] : arrays) {
    const std::string member = name + ".npy";
    std::string content = format(array);
    content.append(array.data.begin(), array.data.end());
    if (at + content.size() > 0xFFFF0000u || arrays.size() > 65000) throw Error("is too large: 4 GB at most");
    std::string common;
    put(common, 20, 2);      // version needed
    put(common, 0x0800, 2);  // names are UTF-8
    put(common, 0, 2);       // stored
    put(common, 0x00210000, 4);  // 1980-01-01
    put(common, crc32_of(content.data(), content.size()), 4);
    put(common, content.size(), 4);
    put(common, content.size(), 4);
    put(common, member.size(), 2);
    put(common, 0, 2);
    std::string local;
    put(local, 0x04034b50, 4);
    local += common + member;
    put(directory, 0x02014b50, 4);
    put(directory, 20, 2);
    directory += common;
    put(directory, 0, 6);
    put(directory, 0, 4);
    put(directory, at, 4);
    directory += member;
    stream << local << content;
    at += local.size() + content.size();
  }
  std::string end;
  put(end, 0x06054b50, 4);
  put(end, 0, 4);
  put(end, arrays.size(), 2);
  put(end, arrays.size(), 2);
  put(end, directory.size(), 4);
  put(end, at, 4);
  put(end, 0, 2);
  stream << directory << end;
  stream.close();
  if (!stream || std::rename(draft.c_str(), path.c_str()) != 0) {
    std::remove(draft.c_str());
    throw Error("cannot be written");
  }
}

}  // namespace npz

#endif
