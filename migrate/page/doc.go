// Package page is what becomes of a guest's dirty pages between the capture and
// the standby's copy: a dirty bitmap becomes a list of pages, and each of them a
// record that says as little as the standby needs to know.
//
// Per page the Encoder says nothing if the standby has it already, else that it
// is zero, else what changed (a delta against what the standby has), else the
// page compressed where that pays, else the page as it is. FORMAT.md holds the
// format of the records for people; this package is its only reader and writer.
//
// # Who knows what
//
// The Encoder keeps a bounded cache of what the standby has. It is a cache of
// knowledge, not of state both sides share: the Decoder keeps none and reads the
// standby's own copy, which has every page. What the Encoder evicts or forgets is
// simply sent without reference to what was. So the two are in step as long as
// the Encoder believes nothing that is not so, and that is its owner's promise:
//
//   - What Append has encoded reaches the Decoder, in that order, or is forgotten
//     (Forget, Reset) before the next Append.
//   - Two records of one page are not under way against the same copy: the first
//     has been applied before the second is decoded.
//
// If the promise is broken nevertheless, the Decoder finds out: every record
// carries a checksum of the page that must result, and a page that does not come
// out as the Encoder meant it is ErrBase. Whether a page is unchanged is decided
// by comparing all of it, never by a checksum.
//
// What is written here is Go without unsafe, and allocates nothing per page.
package page
