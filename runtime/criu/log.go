// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// Explain adds the first error line of a CRIU log to err, or what else there is to
// say of it: CRIU's own answer is often no more than "type NOTIFY errno 0".
func Explain(err error, logPath string) error {
	line := FirstError(logPath)
	if line == "" {
		line = lastLines(logPath)
	}
	return fmt.Errorf("%w: %s (log: %s)", err, line, logPath)
}

// lastLines are the last three lines of a log that names no error, which is what
// CRIU was at.
func lastLines(logPath string) string {
	f, err := os.Open(logPath)
	if err != nil {
		return fmt.Sprintf("there is no log to say why: %v", err)
	}
	defer f.Close()
	const tail = 1 << 10
	if fi, err := f.Stat(); err == nil && fi.Size() > tail {
		_, _ = f.Seek(-tail, io.SeekEnd) // else the first lines are shown
	}
	b, err := io.ReadAll(io.LimitReader(f, tail))
	if err != nil || len(b) == 0 {
		return fmt.Sprintf("its log is empty (%v)", err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return fmt.Sprintf("its log names no error and ends in %q", lines[max(0, len(lines)-3):])
}

// harmless is an error line that CRIU writes and goes on: root without
// CAP_SYS_RESOURCE may not raise its own limit (criu/util.c, rlimit_unlimit_nofile).
const harmless = "rlimit: Can't setup RLIMIT_NOFILE for self"

// FirstError returns the first error line of a CRIU log that says why it failed,
// without its time stamp; empty if there is none. Lines look like
// "(00.123456) Error (criu/files.c:12): text" (criu/include/log.h).
func FirstError(logPath string) string {
	f, err := os.Open(logPath)
	if err != nil {
		return ""
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 64<<10), 1<<20)
	for sc.Scan() {
		if _, text, ok := strings.Cut(sc.Text(), "Error ("); ok && !strings.Contains(text, harmless) {
			return "Error (" + strings.TrimSpace(text)
		}
	}
	return ""
}
