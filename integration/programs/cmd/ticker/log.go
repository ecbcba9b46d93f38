// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
)

// counterLog is an append-only file of numbers, 8 bytes each, from 1. At every
// instant its last number is the one in memory, or one more: the file is
// written first. A file system that was cut at another instant than the memory
// breaks that.
type counterLog struct {
	f       *os.File
	fsync   bool
	counter atomic.Uint64
}

func openLog(path string, fsync bool) (*counterLog, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return &counterLog{f: f, fsync: fsync}, nil
}

// next verifies the file's end and appends the next number.
func (l *counterLog) next() error {
	last := l.counter.Load()
	st, err := l.f.Stat()
	if err != nil {
		return err
	}
	if want := int64(last) * 8; st.Size() != want {
		return fmt.Errorf("%s has %d bytes and memory says %d", l.f.Name(), st.Size(), want)
	}
	var b [8]byte
	if last > 0 {
		if _, err := l.f.ReadAt(b[:], int64(last-1)*8); err != nil {
			return fmt.Errorf("reading the last number back: %w", err)
		}
		if n := binary.LittleEndian.Uint64(b[:]); n != last {
			return fmt.Errorf("%s ends in %d and memory says %d", l.f.Name(), n, last)
		}
	}
	binary.LittleEndian.PutUint64(b[:], last+1)
	if _, err := l.f.WriteAt(b[:], int64(last)*8); err != nil {
		return err
	}
	if l.fsync {
		if err := l.f.Sync(); err != nil {
			return err
		}
	}
	l.counter.Store(last + 1)
	return nil
}
