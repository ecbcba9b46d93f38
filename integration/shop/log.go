// SPDX-License-Identifier: Apache-2.0

package shop

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// record is one line of a load client's log. Times are nanoseconds since the
// epoch; a line without an ack time is an attempt that nobody answered.
type record struct {
	Worker int    `json:"w"`
	Token  string `json:"t,omitempty"`
	Sent   int64  `json:"s,omitempty"`
	Acked  int64  `json:"a,omitempty"`
	Seq    int64  `json:"seq,omitempty"`
	Count  int64  `json:"n,omitempty"`
	Err    string `json:"err,omitempty"`
	// End marks the last line of a client that stopped in order.
	End bool `json:"end,omitempty"`
}

// Log is what a load client wrote down.
type Log struct {
	Acks     []Ack
	Attempts []Attempt
	// Complete is false when the client did not live to write its last line:
	// orders may then have been placed that the log does not name.
	Complete bool
}

// Split divides a log at an instant that lies between two lives of the shop:
// what was sent before t, and what was sent at t or later.
func (l *Log) Split(t time.Time) (before, after *Log) {
	before, after = &Log{Complete: l.Complete}, &Log{Complete: l.Complete}
	for _, a := range l.Acks {
		side := before
		if !a.Sent.Before(t) {
			side = after
		}
		side.Acks = append(side.Acks, a)
	}
	for _, a := range l.Attempts {
		side := before
		if !a.Sent.Before(t) {
			side = after
		}
		side.Attempts = append(side.Attempts, a)
	}
	return before, after
}

// LogWriter appends to a load client's log. It may be used concurrently. Each
// record is one write(2): whoever reads the file while the client runs sees
// whole lines up to the present, and nothing is lost if the client is killed.
type LogWriter struct {
	mu  sync.Mutex
	w   io.Writer
	err error
}

// NewLogWriter writes to w, which the caller closes.
func NewLogWriter(w io.Writer) *LogWriter { return &LogWriter{w: w} }

// Ack records an answered order.
func (w *LogWriter) Ack(a Ack) {
	w.put(record{
		Worker: a.Worker, Token: a.Token, Sent: a.Sent.UnixNano(), Acked: a.Acked.UnixNano(),
		Seq: a.Seq, Count: a.Count,
	})
}

// Attempt records an order that got no answer.
func (w *LogWriter) Attempt(a Attempt) {
	w.put(record{Worker: a.Worker, Token: a.Token, Sent: a.Sent.UnixNano(), Err: a.Err})
}

// End writes the last line and returns the first error of any write.
func (w *LogWriter) End() error {
	w.put(record{End: true})
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *LogWriter) put(r record) {
	line, err := json.Marshal(r)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		_, err = w.w.Write(append(line, '\n'))
	}
	if w.err == nil && err != nil {
		w.err = fmt.Errorf("writing the load log: %w", err)
	}
}

// ReadLog reads a log, also one that is still being written: a half line at
// its end is left out.
func ReadLog(path string) (*Log, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the load log: %w", err)
	}
	defer f.Close()
	l := &Log{}
	in := bufio.NewReader(f)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return l, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the load log %s: %w", path, err)
		}
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("load log %s line %d: %w", path, n, err)
		}
		switch {
		case r.End:
			l.Complete = true
		case r.Acked != 0:
			l.Acks = append(l.Acks, Ack{
				OrderAnswer: OrderAnswer{Seq: r.Seq, Token: r.Token, Count: r.Count},
				Worker:      r.Worker, Sent: time.Unix(0, r.Sent), Acked: time.Unix(0, r.Acked),
			})
		default:
			l.Attempts = append(l.Attempts, Attempt{
				Token: r.Token, Worker: r.Worker, Sent: time.Unix(0, r.Sent), Err: r.Err,
			})
		}
	}
}
