// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

// The kernel's names of what is on its internal tmpfs (mm/shmem.c, mm/memfd.c,
// ipc/shm.c), as in /proc/PID/maps and the links of /proc/PID/fd.
const (
	nameAnonymous = "/dev/zero"
	nameMemfd     = "/memfd:"
	nameSysV      = "/SYSV"
)

// internal returns the device number of the kernel's internal tmpfs, by which
// CRIU, too, knows these objects (criu/kerndat.c, kerndat_get_shmemdev).
var internal = sync.OnceValues(func() (uint64, error) {
	fd, err := unix.MemfdCreate("", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("memfd_create: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Dev, nil
})

// finding is what a container has of shared memory.
type finding struct {
	dev     uint64
	objects map[uint64]*object // by inode number
	sysv    map[uint64]uint64  // segment id: size in bytes
}

// find adds the objects that the processes map, or have open. A process that has
// ended meanwhile has none.
func (f *finding) find(pids []int) error {
	for _, pid := range pids {
		err := errors.Join(f.mapped(pid), f.open(pid))
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("find the shared memory of process %d: %w", pid, err)
		}
	}
	return nil
}

// mapped adds what a process maps.
func (f *finding) mapped(pid int) error {
	return eachMapping(pid, deviceName(f.dev), func(ino uint64, name, addresses string) error {
		return f.add(ino, name, fmt.Sprintf("/proc/%d/map_files/%s", pid, addresses))
	})
}

// deviceName is a device as maps files name it.
func deviceName(dev uint64) string {
	return fmt.Sprintf("%02x:%02x", unix.Major(dev), unix.Minor(dev))
}

// eachMapping reads from the maps file (fs/proc/task_mmu.c, show_map_vma) the
// mappings of files of a device.
func eachMapping(pid int, device string, fn func(ino uint64, name, addresses string) error) error {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[3] != device {
			continue
		}
		ino, err := strconv.ParseUint(fields[4], 10, 64)
		if err != nil {
			return fmt.Errorf("unexpected line in a maps file: %q", lines.Text())
		}
		if err := fn(ino, fields[5], fields[0]); err != nil {
			return err
		}
	}
	return lines.Err()
}

// open looks through the open files for memfds that nobody maps.
func (f *finding) open(pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := dir + "/" + e.Name()
		link, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(link, nameMemfd) {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Dev != f.dev {
			continue
		}
		if err := f.add(st.Ino, link, path); err != nil {
			return err
		}
	}
	return nil
}

func (f *finding) add(ino uint64, name, path string) error {
	if strings.HasPrefix(name, nameSysV) {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			f.sysv[ino] = uint64(st.Size)
		}
		return nil
	}
	if f.objects[ino] != nil || ino > pages.MaxObject || !strings.HasPrefix(name, nameAnonymous) && !strings.HasPrefix(name, nameMemfd) {
		return nil
	}
	// Nothing of the object changes by being read: not even the time of its last access.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // unmapped or closed meanwhile
	} else if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil || st.Dev != f.dev || st.Ino != ino {
		return errors.Join(err, file.Close()) // by now it is another
	}
	f.objects[ino] = &object{ino: ino, file: file, anonymous: strings.HasPrefix(name, nameAnonymous)}
	return nil
}

// data returns where a file has data, by offset, in whole pages. What was
// allocated and never written, and what was punched out, is not data.
func data(f *os.File) (out []pages.Range, err error) {
	fd, at := int(f.Fd()), int64(0)
	for {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("lseek(SEEK_DATA) from %d: %w", at, err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) {
			at = start // cut shorter meanwhile
			continue
		} else if err != nil {
			return nil, fmt.Errorf("lseek(SEEK_HOLE) from %d: %w", start, err)
		}
		r := pages.Range{Start: uint64(start) / pageSize * pageSize, End: (uint64(end) + pageSize - 1) / pageSize * pageSize}
		if n := len(out); n > 0 && r.Start <= out[n-1].End {
			out[n-1].End = max(out[n-1].End, r.End)
		} else {
			out = append(out, r)
		}
		at = end
	}
}
