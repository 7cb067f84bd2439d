// The mean of each station's hours of rain, some of which are missing: go run mean.go [http://localhost:8000]
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"time"
)

type tensor struct {
	Dtype   string `json:"dtype"`
	Shape   []int  `json:"shape"`
	Offsets [2]int `json:"data_offsets"`
}

type problem struct {
	Code   string `json:"code"`   // stable
	Detail string `json:"detail"` // for people
}

func (p problem) Error() string { return p.Code + ": " + p.Detail }

// write gives safetensors: the length of the header (8 bytes, little-endian), the header, the cells one after the other.
func write(rain []float32, valid []bool, shape ...int) []byte {
	end := 4 * len(rain)
	header, _ := json.Marshal(map[string]tensor{
		"rain":      {"F32", shape, [2]int{0, end}},
		"rain.mask": {"BOOL", shape, [2]int{end, end + len(valid)}},
	})
	var out bytes.Buffer
	for _, part := range []any{uint64(len(header)), header, rain, valid} {
		binary.Write(&out, binary.LittleEndian, part)
	}
	return out.Bytes()
}

// read fills cells, a slice of numbers or bools, with the tensor of that name.
func read(payload []byte, name string, cells any) error {
	start := 8 + binary.LittleEndian.Uint64(payload)
	var header map[string]json.RawMessage // beside tensors it has __metadata__
	if err := json.Unmarshal(payload[8:start], &header); err != nil {
		return err
	}
	var found tensor
	if err := json.Unmarshal(header[name], &found); err != nil {
		return err
	}
	return binary.Read(bytes.NewReader(payload[start:][found.Offsets[0]:found.Offsets[1]]), binary.LittleEndian, cells)
}

func ask(base, query string, body []byte) ([]byte, error) {
	client := http.Client{Timeout: 30 * time.Second}
	response, err := client.Post(base+"/v1/reduce?"+query, "application/vnd.safetensors", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	payload, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		var told problem
		if err = json.Unmarshal(payload, &told); err == nil {
			err = told
		}
	}
	return payload, err
}

func main() {
	base := "http://localhost:8000"
	if len(os.Args) > 1 {
		base = strings.TrimRight(os.Args[1], "/")
	}
	rain := []float32{0.5, 1.5, 0, 4, 2, 0, 0, 0, 0, 0, 0, 0} // what lies under a mask does not matter
	valid := []bool{true, true, false, true, true, false, false, true, false, false, false, false}
	question := write(rain, valid, 3, 4)

	answer, err := ask(base, "op=mean&dim=1", question)
	if err != nil {
		log.Fatal(err)
	}
	means, there := make([]float32, 3), make([]bool, 3)
	if err := read(answer, "rain", means); err != nil {
		log.Fatal(err)
	}
	if err := read(answer, "rain.mask", there); err != nil {
		log.Fatal(err)
	}
	for i, mean := range means {
		if there[i] {
			fmt.Printf("station %d: %v\n", i+1, mean)
		} else {
			fmt.Printf("station %d: no data\n", i+1)
		}
	}

	if _, err := ask(base, "op=maen&dim=1", question); err != nil {
		fmt.Println("refused:", err)
	}
}
