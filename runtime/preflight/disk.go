// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The margin covers CRIU's own images, manifests, and what grows until the cut: a
// tenth, and 64 MiB for small groups.
const (
	marginPart  = 10
	marginBytes = 64 << 20
)

// disk compares what the members need with what is free, for each file system
// that captures are written to.
func (c *checker) disk() {
	needs := make(map[string]uint64)
	var dirs []string
	for _, m := range c.members {
		need := m.MemoryBytes + m.StorageBytes
		c.report.NeededBytes += need
		dir := c.opts.CaptureDir
		if dir == "" && m.StorageAddress != "" {
			dir = filepath.Dir(strings.TrimPrefix(m.StorageAddress, "unix://"))
			if sub := filepath.Join(dir, "captures"); exists(sub) {
				dir = sub
			}
		}
		if dir == "" {
			c.find(Refuse, CodeDisk, m, nil, "create it with --snapshotter cohort", "has a root file system that is not on the cohort snapshotter")
			continue
		}
		if _, ok := needs[dir]; !ok {
			dirs = append(dirs, dir)
		}
		needs[dir] += need
	}
	for _, dir := range dirs {
		need := needs[dir] + needs[dir]/marginPart + marginBytes
		free, err := freeBytes(dir)
		if err != nil {
			c.find(Refuse, CodeDisk, nil, nil, "start cohortd, which makes it", "the directory for captures, %s, cannot be looked at (%v)", dir, err)
			continue
		}
		if free < need {
			c.find(Refuse, CodeDisk, nil, nil, "free some, or remove checkpoints that are no longer needed",
				"the checkpoint needs about %s in %s and %s are free", bytes(need), dir, bytes(free))
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// freeBytes is what root may still write below dir. A file system in a loop image
// is grown by cohortd, so what is free around the image counts too.
func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	free := st.Bfree * uint64(st.Bsize)
	if image := loopImage(dir); image != "" {
		if err := unix.Statfs(filepath.Dir(image), &st); err == nil {
			free += st.Bfree * uint64(st.Bsize)
		}
	}
	return free, nil
}

// loopImage is the file behind the file system of dir, empty for a real disk.
func loopImage(dir string) string {
	st, err := statx(dir)
	if err != nil || st.Mask&unix.STATX_MNT_ID == 0 {
		return ""
	}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	id := strconv.FormatUint(st.Mnt_id, 10) + " "
	for line := range strings.Lines(string(data)) {
		if !strings.HasPrefix(line, id) {
			continue
		}
		_, after, _ := strings.Cut(line, " - ")
		fields := strings.Fields(after)
		if len(fields) < 2 || !strings.HasPrefix(fields[1], "/dev/loop") {
			return ""
		}
		backing, err := os.ReadFile("/sys/block/" + filepath.Base(fields[1]) + "/loop/backing_file")
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(backing))
	}
	return ""
}
