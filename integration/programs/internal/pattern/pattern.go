// SPDX-License-Identifier: Apache-2.0

// Package pattern is data that can be verified from its position alone: the
// byte at each position of a stream, or the word at each index of a memory, is
// a fixed pseudo-random function of it. Two different positions agree by
// chance only, so a byte lost, doubled or moved shows within a few bytes.
package pattern

import "encoding/binary"

// Mix is the output function of splitmix64 (Steele, Lea, Flood 2014): a
// bijection of 64 bits that no structure of its input survives.
func Mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Fill fills b with the stream's bytes from position pos on.
func Fill(b []byte, pos uint64) {
	var word [8]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(word[:], Mix(pos/8))
		n := copy(b, word[pos%8:])
		b = b[n:]
		pos += uint64(n)
	}
}

// Verify compares b with the stream's bytes from position pos on. It returns
// the first position that differs, and whether there is one.
func Verify(b []byte, pos uint64) (at uint64, differs bool) {
	var word [8]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(word[:], Mix(pos/8))
		want := word[pos%8:]
		n := min(len(want), len(b))
		for i := range n {
			if b[i] != want[i] {
				return pos + uint64(i), true
			}
		}
		b = b[n:]
		pos += uint64(n)
	}
	return 0, false
}
