// SPDX-License-Identifier: Apache-2.0

// Package report writes a test program's reports and ends it. A report is
// renamed into place, so whoever reads it finds a whole one.
package report

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// Writer writes the reports of one process. It may be used concurrently.
type Writer struct {
	path string
	fill func(n int) any
	mu   sync.Mutex
	n    int
}

// Serve writes a first report, numbered 0, then one for each SIGUSR1, and ends
// the process in order upon SIGTERM or SIGINT. fill returns the report with
// number n; it runs on a goroutine of Serve's. An empty path means that no
// report is wanted.
func Serve(path string, fill func(n int) any) *Writer {
	w := &Writer{path: path, fill: fill, n: -1}
	sigs := listen()
	w.Write()
	go func() {
		for sig := range sigs {
			if sig != syscall.SIGUSR1 {
				os.Exit(0)
			}
			w.Write()
		}
	}()
	return w
}

// listen is before the first report: whoever has seen that may send a signal.
func listen() chan os.Signal {
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, syscall.SIGUSR1, syscall.SIGTERM, syscall.SIGINT)
	return sigs
}

// Write writes a report now.
func (w *Writer) Write() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	if w.path == "" {
		return
	}
	b, err := json.Marshal(w.fill(w.n))
	if err == nil {
		err = os.WriteFile(w.path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(w.path+".new", w.path)
	}
	if err != nil {
		Exit(1, "writing the report: %v", err)
	}
}

// Exit says why on standard error and ends the process.
func Exit(code int, format string, args ...any) {
	fmt.Fprintf(os.Stderr, os.Args[0]+": "+format+"\n", args...)
	os.Exit(code)
}
