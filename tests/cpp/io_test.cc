// Storage formats and JSON. Run under sanitizers in CI, as is checkpoint_test.

#include <bit>
#include <cmath>
#include <limits>

#include <doctest/doctest.h>
#include "alignpro/core/dtype.h"
#include "alignpro/core/error.h"
#include "alignpro/io/json.h"
#include "alignpro/io/mapped_file.h"
#include "model_file_builder.h"

using namespace alignpro;
using build::raw;
using build::TempFolder;
using io::Json;

namespace {

Json parse(std::string_view text) { return Json::parse(text, "t.json"); }

std::vector<float> expand(DType dtype, const std::string& bytes, int64_t values) {
  std::vector<float> out(static_cast<size_t>(values));
  dequantize(dtype, reinterpret_cast<const std::byte*>(bytes.data()), values, out.data());
  return out;
}

}  // namespace

TEST_CASE("f16 every bit pattern") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float got = expand(DType::kF16, raw(static_cast<uint16_t>(bits)), 1)[0];
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double mantissa = bits & 0x3ff, sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31 && mantissa != 0) {
      CHECK(std::isnan(got));
      continue;
    }
    const double want = exponent == 31  ? sign * std::numeric_limits<double>::infinity()
                        : exponent == 0 ? sign * std::ldexp(mantissa, -24)
                                        : sign * std::ldexp(1024 + mantissa, exponent - 25);
    CHECK((static_cast<double>(got) == want && std::signbit(got) == (sign < 0)));
  }
}

TEST_CASE("bf16 is the upper half of a float") {
  const auto got = expand(
      DType::kBF16,
      raw<uint16_t>(0x3f80) + raw<uint16_t>(0xc049) + raw<uint16_t>(0x0001) + raw<uint16_t>(0xff80),
      4);
  CHECK_EQ(got[0], 1.0f);
  CHECK_EQ(got[1], -3.140625f);
  CHECK_EQ(got[2], std::bit_cast<float>(0x00010000u));
  CHECK((std::isinf(got[3]) && got[3] < 0));
}

TEST_CASE("quantised blocks by hand") {
  std::string q8 = raw<uint16_t>(0x3800);  // 0.5
  for (int i = 0; i < 32; ++i) q8 += raw(static_cast<int8_t>(i * 8 - 128));
  std::string nibbles;  // value j is j % 16, value j + 16 is 15 - j
  for (int j = 0; j < 16; ++j) nibbles += static_cast<char>(j | (15 - j) << 4);
  const std::string q4_0 = raw<uint16_t>(0xb400) + nibbles;                          // -0.25
  const std::string q4_1 = raw<uint16_t>(0x4000) + raw<uint16_t>(0xc900) + nibbles;  // 2, -10
  // Two blocks at an odd address: neither stride nor alignment may matter.
  const auto second = [](DType dtype, const std::string& block) {
    const std::string shifted = "x" + block + block;
    std::vector<float> out(64);
    dequantize(dtype, reinterpret_cast<const std::byte*>(shifted.data()) + 1, 64, out.data());
    return std::vector<float>(out.begin() + 32, out.end());
  };
  const auto a = second(DType::kQ8_0, q8), b = second(DType::kQ4_0, q4_0),
             c = second(DType::kQ4_1, q4_1);
  for (int j = 0; j < 32; ++j) {
    const auto i = static_cast<size_t>(j);
    const int nibble = j < 16 ? j : 31 - j;
    CHECK_EQ(a[i], 0.5f * static_cast<float>(j * 8 - 128));
    CHECK_EQ(b[i], -0.25f * static_cast<float>(nibble - 8));
    CHECK_EQ(c[i], 2.0f * static_cast<float>(nibble) - 10.0f);
  }
}

TEST_CASE("row bytes wants whole blocks") {
  CHECK_EQ(row_bytes(DType::kQ4_1, 64), 40);
  CHECK_EQ(row_bytes(DType::kF16, 3), 6);
  CHECK_THROWS_WITH_AS((void)(row_bytes(DType::kQ8_0, 33)), doctest::Contains("multiple of 32"),
                       InvalidArgument);
}

TEST_CASE("mapped file errors name the file") {
  const TempFolder folder;
  build::write(folder / "empty", "");
  CHECK_THROWS_WITH_AS((void)(io::MappedFile(folder / "none")),
                       doctest::Contains("none: cannot be opened"), FileError);
  CHECK_THROWS_WITH_AS((void)(io::MappedFile("")), "expected the path of a file, got none",
                       FileError);
  CHECK_THROWS_WITH_AS((void)(io::MappedFile(folder / "empty")),
                       doctest::Contains("empty: the file is empty"), FileError);
  CHECK_THROWS_WITH_AS((void)(io::MappedFile(folder.path)), doctest::Contains("it is a folder"),
                       FileError);
}

TEST_CASE("json values") {
  const Json root =
      parse(R"( {"a": [1, -2.5e1, true, null], "b": {"c": "\u00e9\ud83d\ude00\n"}} )");
  const Json::Array& a = *root.find("a")->array();
  CHECK_EQ(*a[0].integer(), 1);
  CHECK(a[1].integer() == nullptr);
  CHECK_EQ(*a[1].number(), -25.0);
  CHECK((*a[2].boolean() && a[3].is_null()));
  CHECK_EQ(*root.find("b")->find("c")->string(), std::string("\xc3\xa9\xf0\x9f\x98\x80\n"));
  CHECK((root.find("absent") == nullptr && root.find("a")->find("x") == nullptr));
  CHECK_EQ(*parse("9223372036854775807").integer(), std::numeric_limits<int64_t>::max());
  CHECK(parse("9223372036854775808").integer() == nullptr);
  CHECK_EQ(parse("\xef\xbb\xbf[7]").array()->size(), 1);  // behind a byte order mark
}

TEST_CASE("json refuses what is no json") {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[1,]",
                           "{\"a\":1,}",
                           "{a:1}",
                           "01",
                           "1.",
                           "-",
                           "+1",
                           "1e",
                           "nul",
                           "NaN",
                           "Infinity",
                           "\"",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\t\"",
                           "[1] 2",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\xff\"",
                           "\"\xc0\x80\"",
                           "\"\xed\xa0\x80\"",
                           "\"\xf4\x90\x80\x80\"",
                           "\"\xe2\x82\"",
                           "1e999",
                           "[1 2]",
                           "{\"a\" 1}",
                           "\xef\xbb\xbf",
                           "\xef\xbb\xbf\xef\xbb\xbf[7]"}) {
    CHECK_THROWS_WITH_AS((void)(parse(text)), doctest::Contains("t.json: JSON line 1"), FileError);
  }
  CHECK_THROWS_WITH_AS((void)(parse("{\"a\": 1,\n \"a\": 2}")),
                       doctest::Contains("duplicate key 'a'"), FileError);
  CHECK_THROWS_WITH_AS((void)(parse(std::string(100000, '['))),
                       doctest::Contains("nested too deeply"), FileError);
  CHECK_THROWS_WITH_AS((void)(Json::parse("[1,2,3]", "t", {.max_values = 3})),
                       doctest::Contains("too many values"), FileError);
  CHECK_THROWS_WITH_AS((void)(Json::parse("[1,2,3]", "t", {.max_bytes = 3})),
                       doctest::Contains("over the limit"), FileError);
}
